"""How fast preprocessing.py turns photographs into a data folder, and what memory it takes.

    python -m benchmarks.preprocess

The photographs are synthetic JPEGs of ImageNet's usual size, 500 x 375 and 110 kB, since decoding takes as long as
there are bytes. The whole command is measured, from Python's start to the finished folder; processor time and memory
are those of all its processes.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.common import arguments, parse, report

SCRIPT = Path(__file__).parents[1] / "preprocessing.py"
DIFFERENT = 100  # photographs; the others are their copies
SIZE = (500, 375)
QUALITY = 95  # with the noise below: 110 kB


def photograph(seed: int) -> Image.Image:
    """Smooth shapes at several scales, and a little noise: RGB, half of them upright."""
    random = np.random.default_rng(seed)
    width, height = SIZE if seed % 2 else SIZE[::-1]
    levels = np.full((height, width, 3), 128.0)
    for cells in (4, 16, 64):
        coarse = Image.fromarray(random.integers(256, size=(cells, cells, 3), dtype=np.uint8))
        levels += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) - 128) / cells**0.5
    return Image.fromarray((levels + random.normal(0, 11, levels.shape)).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int) -> float:
    """`count` JPEGs in ten class folders; returns their mean size in kB."""
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)
    for number in range(count):
        file = folder / f"class{number % 10}" / f"{number}.jpg"
        if number < DIFFERENT:
            photograph(number).save(file, quality=QUALITY)
        else:
            original = number % DIFFERENT
            file.write_bytes((folder / f"class{original % 10}" / f"{original}.jpg").read_bytes())
    return sum(file.stat().st_size for file in folder.glob("*/*.jpg")) / count / 1000


def resident_gib(process: psutil.Process) -> float:
    """Of a process and all below it; what they share counts in each."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total / 2**30


def measure(photographs: Path, output: Path, workers: int, resolution: int) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the processor, and GiB at the most."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
    options = {"--imagenet-path": photographs, "--output-path": output, "--resolution": resolution}
    options |= {"--num-workers": workers}
    command = [sys.executable, SCRIPT, *(str(part) for option in options.items() for part in option)]
    with psutil.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident_gib(process))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"preprocessing.py ended with {process.returncode}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="how many photographs (default: 20,000; small: 1,000)")
    parser.add_argument("--workers", default="1,2", help="numbers of processes; default: %(default)s")
    parser.add_argument("--resolution", type=int, default=256, help="default: %(default)s")
    args = parse(parser, argv)
    args.images = args.images or (1000 if args.small else 20000)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_photographs(Path(folder, "photographs"), args.images)
        for workers in map(int, args.workers.split(",")):
            output = Path(folder, f"data-{workers}")
            wall, processor, peak = measure(Path(folder, "photographs"), output, workers, args.resolution)
            rates = {"images_per_second": args.images / wall, "images_per_core_second": args.images / processor}
            rows.append({"workers": workers, "images": args.images} | rates | {"peak_gib": peak})
    report(args, "preprocess", rows, [f"JPEGs of {SIZE[0]} x {SIZE[1]} and {kilobytes:.0f} kB on average"])


if __name__ == "__main__":
    main()
