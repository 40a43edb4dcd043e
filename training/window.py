"""Scalars of the steps between two rows of a run's log."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import world_size


class Window:
    """Sums of the scalars of several steps; they stay on the device, and one collective a row brings all together.

    Its clock counts steps alone, not the checkpoints and evaluations between them; and it counts a step as done when
    its scalars are: reading them waits for the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._names, self._sums = [], None

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Count a step: its scalars, the same names at every step."""
        tensors = [torch.as_tensor(value, device=self.device).detach().float() for value in scalars.values()]
        values = torch.stack(tensors)
        self._names, self._sums = list(scalars), values if self._sums is None else self._sums + values
        self.steps += 1
        self._stop_clock()

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now

    def close(self, images_per_step: int) -> dict[str, float]:
        """Means over steps and processes, and `images_per_second`; the next window is empty."""
        if world_size() > 1:
            dist.all_reduce(self._sums)
        means = (self._sums / (self.steps * world_size())).tolist()
        self._stop_clock()
        row = dict(zip(self._names, means, strict=True))
        row["images_per_second"] = images_per_step * self.steps / self.seconds
        self._reset()
        return row
