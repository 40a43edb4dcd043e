"""How fast cache_latents.py encodes, and whether it waits for the disk.

    python -m benchmarks.cache

Images a second of the VAE's encoder alone, and of `cache_latents.encode_blocks`, which writes each batch while the next
one is encoded: onto this disk, and onto one that takes half as long for a batch as the encoder. `waited_percent` says
how much of the slow disk's time came on top: 0 is none, 100 all of it. The last batch has no next one to hide behind.
All is float32 without TF32, in which latents are cached.
"""

import argparse
import itertools
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.common import arguments, fastest, forget_peak, matmul_flops, parse, peak_gib, report, seconds
from benchmarks.sample import count_flops
from cache_latents import encode_blocks
from dataset.data import ImageData
from dataset.latent_cache import LatentCache
from models.posterior import encode_moments, to_mean_std
from models.vae import build_vae, latent_shape
from utils.images import to_signed

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SLOW_DISK = 0.5  # of the time for which a batch is encoded


class SlowCache(LatentCache):
    """A cache on a disk that takes so many seconds for a batch."""

    delay = 0.0

    def write(self, first: int, mean_std: torch.Tensor) -> None:
        super().write(first, mean_std)
        time.sleep(self.delay)


def write_images(folder: Path, count: int, resolution: int) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, resolution, resolution), np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    (folder / "dataset.json").write_text(json.dumps({"count": count, "resolution": resolution}))
    return ImageData(folder)


def measure(vae_name: str, layout: str, args: argparse.Namespace, folder: Path) -> dict:
    """A row of the table."""
    torch.manual_seed(0)
    vae = build_vae(vae_name).eval().requires_grad_(False).to(args.device, memory_format=FORMATS[layout])
    data = write_images(folder, args.batches * args.batch_size, args.resolution)
    channels, *side = latent_shape(vae, args.resolution)
    description = dict.fromkeys(LatentCache.IDENTITY)
    description |= {"shape": [len(data), 2 * channels, *side], "dtype": "float32"}
    blocks = [range(first, first + args.batch_size) for first in range(0, len(data), args.batch_size)]
    images = data.__getitems__(blocks[0])[0].to(args.device)
    options = SimpleNamespace(num_workers=args.num_workers)

    @torch.inference_mode()
    def encode() -> None:
        to_mean_std(encode_moments(vae, to_signed(images)))

    def cache(delay: float) -> None:
        cache = SlowCache(folder / "z", description)
        cache.delay = delay
        cache.start(overwrite=True)
        cache.open()
        encode_blocks(vae, data, blocks, cache, options, show=False)

    product = matmul_flops(args.device, torch.float32)
    flops = count_flops(lambda: encode_moments(vae, to_signed(images[:1])))
    forget_peak(args.device)
    alone = fastest({"encode": encode}, args.device, repeats=args.repeats)["encode"]
    delay = SLOW_DISK * alone.wall
    disks = partial(cache, 0.0), partial(cache, delay)
    rounds = [[seconds(disk, args.device).wall for disk in disks] for _ in range(args.repeats)]
    whole, slow = map(min, zip(*rounds, strict=True))
    return {
        "vae": vae_name,
        "layout": layout,
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "encode_images_per_second": args.batch_size / alone.wall,
        "cache_images_per_second": len(data) / whole,
        "slow_disk_images_per_second": len(data) / slow,
        "waited_percent": 100 * (slow - whole) / (len(blocks) * delay),
        "encode_flops_percent": 100 * args.batch_size * flops / alone.best(args.device) / product,
        "peak_gib": peak_gib(args.device),
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vaes", default="f8d4,f16d32", help="comma list; default: %(default)s")
    parser.add_argument("--resolution", type=int, help="of the images (default: 256; small: 32)")
    parser.add_argument("--batch-size", type=int, help="(default: 64; small: 2)")
    parser.add_argument("--batches", type=int, default=8, help="that are cached; default: %(default)s")
    parser.add_argument("--num-workers", type=int, help="loader processes (default: 4; small: 0)")
    parser.add_argument("--repeats", type=int, default=3, help="of each part, of which the fastest counts; default: 3")
    args = parse(parser, argv)
    args.resolution = args.resolution or (32 if args.small else 256)
    args.batch_size = args.batch_size or (2 if args.small else 64)
    args.num_workers = (0 if args.small else 4) if args.num_workers is None else args.num_workers
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    rows = []
    for vae, layout in itertools.product(args.vaes.split(","), FORMATS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(vae, layout, args, Path(folder)))
    report(args, "cache", rows)


if __name__ == "__main__":
    main()
