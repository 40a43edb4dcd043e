"""Cache the latents of a data folder under a frozen VAE, as mean and std, for train_ldm_only.py.

    accelerate launch --num_machines=1 --num_processes=8 cache_latents.py --vae-arch f16d32 \\
        --vae-ckpt-path exps/e2e-vae/e2e-vae.pt --vae-latents-name e2e-vae

writes data/e2e-vae.npy and data/e2e-vae.json. A killed job goes on where it stopped when it is started again, with any
number of processes. Everything is float32 without TF32: the cache is computed once and trained on for long.
"""

from configs.arguments import cache_parser
from utils.inputs import require_inputs

if __name__ == "__main__":  # --help, a mistyped flag and missing files are answered before the heavy imports
    cache_parser().answer_before_imports(check=require_inputs)

import contextlib
import logging
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.data import ImageData
from dataset.latent_cache import LatentCache
from models.posterior import encode_moments, to_mean_std
from models.vae import downsampling, latent_channels, latent_statistics, load_vae, vae_config
from models.vae_files import vae_sha256
from utils.background import HostCopy, ahead
from utils.distributed import launcher_notes, main_first, start_processes
from utils.errors import (
    InputError,
    about,
    command,
    leave_signals_to_the_parent,
    signals_held_back,
    when_interrupted,
)
from utils.images import to_signed

FLUSH_SECONDS = 20.0  # what a killed job loses at most


@command
def main(argv: list[str] | None = None) -> None:
    args = cache_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    processes = start_processes()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if processes.is_main_process:
        for note in launcher_notes(mixed_precision=("no", "float32, in which latents are cached,")):
            logging.warning(note)

    # What can be refused is refused before anything is written; a finished cache stays as it is.
    with main_first():
        if Path(args.vae_latents_name).name != args.vae_latents_name:
            needed = "a name without folders is needed (see --output-dir)"
            raise InputError(f"--vae-latents-name: {args.vae_latents_name!r} was given; {needed}")
        data = ImageData(args.data_dir)
        notes = []
        vae = load_vae(args.vae_arch, args.vae_ckpt_path, flags=("--vae-arch", "--vae-ckpt-path"), say=notes.append)
        for note in notes if processes.is_main_process else ():
            logging.warning(note)
        stored = latent_statistics(args.vae_ckpt_path, vae, flag="--vae-ckpt-path")
        path = Path(args.output_dir or args.data_dir, args.vae_latents_name)
        cache = LatentCache(path, describe(args, vae, data) | {"notes": notes})
        unfinished = cache.start(overwrite=args.overwrite)
    if not unfinished:
        if processes.is_main_process:
            print(f"{cache.array_path} is there already, of this VAE and this data set")
        return

    # Encode what is missing, each process its blocks.
    started = time.perf_counter()
    going_on = "interrupted; the latents that are finished stay, and the same command goes on from them"
    with contextlib.closing(cache), when_interrupted(lambda: going_on):
        cache.open()
        blocks = cache.missing_blocks(args.pproc_batch_size)
        processes.wait_for_everyone()  # nobody may write before all know what is missing
        mine = blocks[processes.process_index :: processes.num_processes]
        with about("--vae-ckpt-path"):
            encode_blocks(vae.to(processes.device), data, mine, cache, args, show=processes.is_main_process)
            processes.wait_for_everyone()

            # The latent statistics: those stored with the VAE, else measured on the whole cache, by all together.
            scale, bias = stored or cache.statistics()
        if processes.is_main_process:
            cache.finish(latents_scale=scale.flatten().tolist(), latents_bias=bias.flatten().tolist())
            written = f"{args.dtype} {tuple(cache.description['shape'])} in {time.perf_counter() - started:.0f} s"
            print(f"{cache.array_path}: {written}; latent statistics {'of the VAE' if stored else 'measured'}")
        processes.wait_for_everyone()


def describe(args, vae, data: ImageData) -> dict:
    """The cache's JSON, without the statistics."""
    factor = downsampling(vae)
    if data.resolution % factor:
        needed = f"needs images of a multiple of {factor} pixels"
        raise InputError(f"--vae-arch: {args.vae_arch} {needed}; those in {args.data_dir} have {data.resolution}")
    side = data.resolution // factor
    return {
        "name": args.vae_latents_name,
        "vae": str(args.vae_ckpt_path),
        "vae_sha256": vae_sha256(args.vae_ckpt_path, vae),
        "vae_config": vae_config(vae),
        "dataset_fingerprint": data.fingerprint,
        "count": len(data),
        "shape": [len(data), 2 * latent_channels(vae), side, side],
        "dtype": args.dtype,
        "resolution": data.resolution,
    }


def encode_blocks(vae, data: ImageData, blocks: list[range], cache: LatentCache, args, *, show: bool) -> None:
    """Encode this process's blocks of images into the cache; each is written while a thread encodes the next one."""
    device = next(vae.parameters()).device
    loader = DataLoader(
        data,
        batch_sampler=[list(block) for block in blocks],
        collate_fn=as_it_is,
        num_workers=args.num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
    )

    @torch.inference_mode()
    def encode(batch) -> HostCopy:
        images, _ = batch
        return HostCopy(to_mean_std(encode_moments(vae, to_signed(images.to(device, non_blocking=True)))))

    with signals_held_back():  # until its processes leave them to this one
        batches = iter(loader)
    last_flush = time.monotonic()
    with ahead(map(encode, batches)) as encoded:
        try:
            for block, mean_std in zip(tqdm(blocks, unit="batch", disable=not show), encoded, strict=True):
                cache.write(block.start, mean_std.wait())
                if time.monotonic() - last_flush > FLUSH_SECONDS:
                    cache.flush()
                    last_flush = time.monotonic()
        finally:
            cache.flush()  # what is written counts, also where the job is interrupted


def as_it_is(batch):
    """`ImageData.__getitems__` has collated the batch; a lambda would not reach spawned workers."""
    return batch


if __name__ == "__main__":
    main()
