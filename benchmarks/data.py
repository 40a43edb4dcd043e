"""How fast training's batches are read: images, latents, and both, in one process and by loader processes.

    python -m benchmarks.data

The data folder is synthetic, made in a temporary folder, and in the page cache when it is read: what is measured is the
work of reading, to which a disk adds its own waiting. Processor time is that of all processes together; the fastest of
the rounds counts, as other load only ever slows them down.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.common import arguments, parse, report
from dataset.data import ImageData, LatentData, LatentsAndLabels
from dataset.order import batches

GOAL = 8 * 585  # images a second of a node: LDM-only with alignment, which reads latents and images, on 8 GPUs
RESOLUTION = 256
LATENTS = {"f8d4": (8, 32, 32), "f16d32": (64, 16, 16)}  # mean and std
ROUNDS = 3


def write_ones(file: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An .npy file that takes its room on the disk; what its numbers say does not matter to a copy."""
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)[...] = 1


def write_data_folder(folder: Path, count: int) -> None:
    """A data folder with latents of every shape beside it."""
    write_ones(folder / "images.npy", (count, 3, RESOLUTION, RESOLUTION), np.uint8)
    np.save(folder / "labels.npy", np.arange(count) % 1000)
    (folder / "dataset.json").write_text(json.dumps({"count": count, "resolution": RESOLUTION}))
    for name, shape in LATENTS.items():
        write_ones(folder / f"{name}.npy", (count, *shape), np.float32)
        (folder / f"{name}.json").write_text(json.dumps({"count": count}))


def data_sets(folder: Path) -> dict:
    """What each training script reads."""
    images = ImageData(folder)
    latents = {name: LatentData(folder / name) for name in LATENTS}
    return (
        {"images": images}
        | {f"{name} latents": LatentsAndLabels(latents[name], images, with_images=False) for name in LATENTS}
        | {f"{name} latents and images": LatentsAndLabels(latents[name], images, with_images=True) for name in LATENTS}
    )


def processor_seconds() -> float:
    """Of this process and of those that it started and that still run."""
    started = [psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children()]
    return time.process_time() + sum(times.user + times.system for times in started)


def measure(data, *, batch_size: int, workers: int, seconds: float, pin_memory: bool) -> dict[str, float]:
    """Images a second and a core-second, in the steady state, and seconds from nothing to the first batch."""
    start = time.perf_counter()
    loader = batches(data, batch_size=batch_size, seed=0, num_workers=workers, pin_memory=pin_memory)
    next(loader)
    first_batch = time.perf_counter() - start

    # A round begins and ends with full queues, so that what is read ahead counts once.
    rates = []
    for number in range(ROUNDS + 1):
        wall, processor, count = time.perf_counter(), processor_seconds(), 0
        while time.perf_counter() - wall < seconds / ROUNDS:
            next(loader)
            count += batch_size
        if number:  # the first fills the queues
            rates.append((count / (time.perf_counter() - wall), count / (processor_seconds() - processor)))
    by_wall, by_core = (max(column) for column in zip(*rates, strict=True))
    return {"images_per_second": by_wall, "images_per_core_second": by_core, "first_batch_seconds": first_batch}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=32, help="of one process; default: %(default)s")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loader processes; default: %(default)s")
    parser.add_argument("--images", type=int, help="of the data folder (default: 20,000; small: 2,000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of reading for a row; default: %(default)s")
    args = parse(parser, argv)
    args.images = args.images or (2000 if args.small else 20000)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_data_folder(Path(folder), args.images)
        for name, data in data_sets(Path(folder)).items():
            for workers in map(int, args.workers.split(",")):
                how = dict(batch_size=args.batch_size, seconds=args.seconds, pin_memory=args.device.type == "cuda")
                found = measure(data, workers=workers, **how)
                cores = GOAL / found["images_per_core_second"]
                rows.append({"what": name, "workers": workers} | found | {"cores_at_goal": cores})

    goal = f"cores_at_goal: to read {GOAL:,} images a second, 585 for each of 8 GPUs"
    disk = f"where memory does not hold them, a disk must give {GOAL * 3 * RESOLUTION**2 / 1e9:.2f} GB/s of images"
    report(args, "data", rows, [f"{goal}; {disk}"])


if __name__ == "__main__":
    main()
