"""Speed and memory of the metrics at Inception's sizes, from given features.

    python -m benchmarks.metrics --threads 2

Features are random (as sparse and as large as Inception's): speed does not depend on them, except that singular
covariances (fewer images than dimensions) take the longer way. The fastest of --repeats rounds counts, as other load
only ever slows them down. Memory is the peak of a call above what the process held before it (Linux only).
"""

import argparse
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation.metrics import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall

DIM, CLASSES = 2048, 1008
BATCH = 64  # of the feature network, and of the sums


def features(count: int, seed: int) -> torch.Tensor:
    """(count, 2048) float32, non-negative, of correlated dimensions with falling variances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=generator) * torch.logspace(0, -3, DIM) / 16
    values = torch.randn(count, DIM, generator=generator)
    return (values @ mix.T + 0.1 * seed).relu()


def moments(values: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = Statistics(DIM)
    for part in values.split(batch):
        statistics.add(part)
    return statistics.moments()


def fid(count: int) -> Callable:
    fake, reference = features(count, 1), moments(features(10000, 2), 1000)
    return lambda: frechet_distance(*moments(fake, 1000), *reference)


def distance_alone(count: int) -> Callable:
    one, other = (moments(features(count, seed), 1000) for seed in (1, 2))
    return lambda: frechet_distance(*one, *other)


def sums_by_batch(count: int) -> Callable:
    values = features(count, 1)
    return lambda: moments(values, BATCH)


def neighbours(count: int, half: bool) -> Callable:
    real, fake = features(count, 1), features(count, 2)
    return lambda: precision_recall(real, fake, half=half)


def kernel(count: int) -> Callable:
    real, fake = features(count, 1), features(count, 2)
    return lambda: kernel_distance(real, fake, subset_size=1000)


def score(count: int) -> Callable:
    probabilities = features(count, 1)[:, :CLASSES].softmax(1)
    return lambda: inception_score(probabilities)


# Name -> what prepares a case, untimed, and returns the call to time; and its arguments.
CASES: dict[str, tuple[Callable, tuple]] = {
    "FID: sums of 10,000 features, distance": (fid, (10000,)),
    "FID: sums of 50,000 features, distance": (fid, (50000,)),
    "Frechet distance alone": (distance_alone, (10000,)),
    "Frechet distance alone, singular (1,000 images)": (distance_alone, (1000,)),
    "sums of 10,000 features in batches of 64": (sums_by_batch, (10000,)),
    "precision, recall 10,000 x 10,000, float32": (neighbours, (10000, False)),
    "precision, recall 10,000 x 10,000, as ADM (float16)": (neighbours, (10000, True)),
    "KID of 10,000 and 10,000": (kernel, (10000,)),
    "Inception Score of 50,000": (score, (50000,)),
}


def resident(what: str) -> float:
    """GB of memory of this process: `VmRSS` now, `VmHWM` at the most since `forget_peak`."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, threads: int, repeats: int) -> tuple[float, float]:
    """Seconds of the fastest round, and additional peak memory in GB."""
    torch.set_num_threads(threads)
    make, arguments = CASES[name]
    call = make(*arguments)
    forget_peak()
    before, rounds = resident("VmRSS"), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - start)
    return min(rounds), resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.threads} threads, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':<54}{'seconds':>8}{'GB more':>9}")
    for name in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, with nothing cached
            seconds, memory = pool.apply(measure, (name, args.threads, args.repeats))
        print(f"{name:<54}{seconds:>8.2f}{memory:>9.2f}")


if __name__ == "__main__":
    main()
