"""Scalars of the steps between two rows of a run's log."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import world_size

# What a row says about the machine; no two runs share it.
SPEEDS = ("images_per_second", "data_wait_share", "mfu", "peak_memory_gib")


class Window:
    """Sums of the scalars of several steps; they stay on the device, and one collective a row brings all together.

    Its clock counts steps alone, not the checkpoints and evaluations between them; and it counts a step as done when
    its scalars are: reading them waits for the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # of the steps that had these scalars, and how many

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Count a step. Not every step has every scalar: a mean is that of the steps that had it."""
        values = torch.stack([torch.as_tensor(x, device=self.device).detach().float() for x in scalars.values()])
        sums, count = self._sums.get(tuple(scalars), (0, 0))
        self._sums[tuple(scalars)] = sums + values, count + 1
        self.steps += 1
        self._stop_clock()

    def add_wait(self, seconds: float) -> None:
        """Of the current step: what it has waited for data."""
        self.waited += seconds

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now

    def close(self, images_per_step: int) -> dict[str, float]:
        """Means over steps and processes, `images_per_second` and `data_wait_share`; the next window is empty."""
        sums = torch.cat([sums for sums, _ in self._sums.values()])
        if world_size() > 1:
            dist.all_reduce(sums)
        names = [(name, count * world_size()) for names, (_, count) in self._sums.items() for name in names]
        totals, counts = {}, {}
        for (name, count), value in zip(names, sums.tolist(), strict=True):
            totals[name], counts[name] = totals.get(name, 0) + value, counts.get(name, 0) + count
        self._stop_clock()
        row = {name: totals[name] / counts[name] for name in totals}
        row["images_per_second"] = images_per_step * self.steps / self.seconds
        row["data_wait_share"] = self.waited / self.seconds
        self._reset()
        return row
