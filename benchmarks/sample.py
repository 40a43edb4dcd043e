"""How fast generate.py samples: images a second of the whole job, and the shares of SiT, decoding, copying and writing.

    python -m benchmarks.sample
    python -m benchmarks.sample --precisions bf16 --batch-sizes 256 --num-steps 250

The whole job is `generate.draw_missing` on full batches, where a batch is written while the next one is drawn; beside
it stands what the parts would give one after the other. FLOPs are torch's count of a forward pass, as a share of those
of a matrix product that is measured in the same run (for the decoder, which stays in float32, of one in float32). That
is no limit on a CPU, where convolutions can be faster.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Seconds, arguments, fastest, forget_peak, matmul_flops, parse, peak_gib, report, seconds
from generate import draw_missing
from models.sit import build_sit
from models.vae import build_vae, latent_shape
from sampling.generation import AUTOCAST, SamplerConfig, decode_latents, sample_latents
from sampling.job import SamplingJob, set_sampling_numerics
from sampling.labels import LabelScheme
from sampling.store import SampleStore
from sampling.trained import TrainedRun
from utils.background import HostCopy

LARGE = (("SiT-XL/2", "f8d4", 256), ("SiT-XL/1", "f16d32", 256))  # SiT, VAE, side of the images
SMALL = (("SiT-S/2", "f4d4-tiny", 64),)
CLASSES, GUIDANCE, BATCHES = 1000, 2.5, 3
ONE_PROCESS = SimpleNamespace(process_index=0, num_processes=1)


@dataclass(frozen=True)
class Case:
    network: tuple[str, str, int]
    precision: str
    compiled: bool
    batch_size: int
    guidance: float


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every combination; on a CPU nothing is compiled, which would take longer than the rest."""
    compiled = (False,) if args.small else (False, True)
    precisions, sizes = args.precisions.split(","), map(int, args.batch_sizes.split(","))
    for values in itertools.product(SMALL if args.small else LARGE, precisions, compiled, sizes, (1.0, GUIDANCE)):
        yield Case(*values)


def random_run(sit_name: str, vae_name: str, resolution: int, device: torch.device) -> TrainedRun:
    """Networks with random weights; SiT's are all different from zero."""
    torch.manual_seed(0)
    vae = build_vae(vae_name)
    shape = latent_shape(vae, resolution)
    sit = build_sit(sit_name, shape, encoder_depth=1, num_classes=CLASSES, z_dims=[])
    for name, parameter in sit.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.02)
    stats = torch.ones(1, shape[0], 1, 1), torch.zeros(1, shape[0], 1, 1)
    networks = (network.eval().requires_grad_(False) for network in (sit, vae))
    run = TrainedRun("random", 0, Path("random"), {}, *networks, None, stats, [])
    run.to(device)
    return run


def count_flops(call: Callable[[], object]) -> int:
    """Of a forward pass, a multiplication with its addition as two."""
    plain = sdpa_kernel(SDPBackend.MATH)  # torch does not count the fused attention of a CPU
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure(case: Case, args: argparse.Namespace, folder: Path) -> dict:
    """A row of the table."""
    device, batch = args.device, range(case.batch_size)
    set_sampling_numerics(SimpleNamespace(precision=case.precision, tf32=True))
    trained = random_run(*case.network, device)
    sampler = SamplerConfig(num_steps=args.num_steps, guidance_scale=case.guidance, precision=case.precision)
    labels = LabelScheme("random", np.arange(CLASSES), seed=0)
    job = SamplingJob(SimpleNamespace(save_png=False), trained, sampler, labels, [])
    y, stats = labels(batch).to(device), trained.latent_stats

    # FLOPs of an image: all evaluations of SiT, and its decoding.
    x_0 = torch.randn(case.batch_size, *latent_shape(trained.vae, trained.resolution), device=device)
    evaluations = sampler.nfe() * (2 if case.guidance > 1 else 1)
    sit_flops = evaluations * count_flops(lambda: trained.sit(x_0[:1], torch.ones(1, device=device), y[:1]))
    decode_flops = count_flops(lambda: decode_latents(trained.vae, x_0[:1], *stats))

    def share(flops: int, spent: Seconds, dtype: torch.dtype) -> float:
        return 100 * case.batch_size * flops / spent.best(device) / matmul_flops(device, dtype)

    # The first batch, with what is prepared and compiled in it; then each part by itself.
    forget_peak(device)
    if case.compiled:
        trained.sit.compile(dynamic=False)
    first = seconds(lambda: job.begin(batch)(), device)
    store, images = open_store(folder, trained.resolution, case.batch_size), decode_latents(trained.vae, x_0, *stats)
    parts = {
        "sit": lambda: sample_latents(trained.sit, batch, y, 0, sampler),
        "decode": lambda: decode_latents(trained.vae, x_0, *stats),
        "write": lambda: store.write(0, to_host(images)),
    }
    spent = fastest(parts, device, repeats=args.repeats)
    one_by_one = sum(part.wall for part in spent.values())

    # The whole, as generate.py does it.
    whole = draw_missing(job, store, None, store.missing(), ONE_PROCESS)
    store.release()
    return {
        "networks": " + ".join(case.network[:2]),
        "precision": case.precision,
        "compiled": "yes" if case.compiled else "no",
        "batch_size": case.batch_size,
        "guidance": case.guidance,
        "images_per_second": whole["images_per_second"],
        "one_by_one_images_per_second": case.batch_size / one_by_one,
        "sit_percent": 100 * spent["sit"].wall / one_by_one,
        "decode_percent": 100 * spent["decode"].wall / one_by_one,
        "copy_write_percent": 100 * spent["write"].wall / one_by_one,
        "sit_flops_percent": share(sit_flops, spent["sit"], AUTOCAST.get(case.precision, torch.float32)),
        "decode_flops_percent": share(decode_flops, spent["decode"], torch.float32),
        "peak_gib": peak_gib(device),
        "first_batch_seconds": first.wall,
    }


def open_store(folder: Path, resolution: int, batch_size: int) -> SampleStore:
    """A new store of the whole job's batches, and of one before them, on which writing is tried."""
    store = SampleStore(
        folder / "x.npz", count=(BATCHES + 1) * batch_size, resolution=resolution, batch_size=batch_size
    )
    store.create({"resolution": resolution, "batch_size": batch_size}, overwrite=True)
    return store


def to_host(images: Tensor) -> np.ndarray:
    return HostCopy(images.permute(0, 2, 3, 1).contiguous()).wait().numpy()


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precisions", help="comma list (default: tf32,bf16,fp16; on a CPU fp32,bf16)")
    parser.add_argument("--batch-sizes", help="comma list (default: 64,256; small: 8)")
    parser.add_argument("--num-steps", type=int, help="of the sampler (default: 50; small: 4)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of each part, after one that warms up; the fastest counts"
    )
    args = parse(parser, argv)
    args.precisions = args.precisions or ("fp32,bf16" if args.device.type == "cpu" else "tf32,bf16,fp16")
    args.batch_sizes = args.batch_sizes or ("8" if args.small else "64,256")
    args.num_steps = args.num_steps or (4 if args.small else 50)

    rows, notes = [], []
    for case in cases(args):
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(measure(case, args, Path(folder)))
            except torch.OutOfMemoryError:
                notes.append(f"too little memory: {case}")
    report(args, "sample", rows, notes)


if __name__ == "__main__":
    main()
