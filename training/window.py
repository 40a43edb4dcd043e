"""Scalars of the steps between two rows of a run's log."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import world_size

# What a row says about the machine; no two runs share it.
SPEEDS = ("images_per_second", "data_wait_share", "mfu", "peak_memory_gib")
NORM = "grad_norm_"  # and a network's short name: a step whose value is not finite has not moved that network


class Window:
    """Sums of the scalars of several steps; they stay on the device, and one collective a row brings all together.

    Its clock counts steps alone, not the checkpoints and evaluations between them; and it counts a step as done when
    its scalars are: reading them waits for the device.

    Attributes, as of the last `close`:
        last: scalars of the last step, means over processes; a value that is not finite on one of them is not finite.
        bad_steps: for each network its steps up to the last, in a row, without a finite gradient norm.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last: dict[str, float] = {}
        self.bad_steps: dict[str, list[int]] = {}
        self._streaks: dict[str, Tensor] = {}  # how many of a network's last steps were bad; not ended by a window
        self._learned: dict[str, list[int]] = {}  # its steps, from the first of these on
        self._reset()

    def _reset(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        # Of the steps that had these scalars: sums and numbers of finite values, and how many steps there were.
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Count a step, by its number. Not every step has every scalar: a mean is that of the steps that had it."""
        names = tuple(scalars)
        values = torch.stack([torch.as_tensor(x, device=self.device).detach().float() for x in scalars.values()])
        finite = values.isfinite()
        sums, counts, steps = self._sums.get(names, (0, 0, 0))
        self._sums[names] = sums + values.nan_to_num(0, 0, 0), counts + finite, steps + 1
        self._last = names, values
        for name, is_finite in zip(names, finite.unbind(), strict=True):
            if name.startswith(NORM):
                network = name.removeprefix(NORM)
                self._streaks[network] = (self._streaks.get(network, 0) + 1) * ~is_finite
                self._learned.setdefault(network, []).append(step)
        self.steps += 1
        self._stop_clock()

    def add_wait(self, seconds: float) -> None:
        """Of the current step: what it has waited for data."""
        self.waited += seconds

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.seconds, self._started = self.seconds + now - self._started, now

    def close(self, images_per_step: int) -> dict[str, float | None]:
        """Means over steps and processes, of what was finite (None: nothing was), `skipped_steps_<network>`,
        `images_per_second` and `data_wait_share`; the next window is empty."""
        names = [name for group in self._sums for name in group]
        steps = [steps for group, (_, _, steps) in self._sums.items() for _ in group]
        sums, counts, last, streaks = self._over_processes()
        self._stop_clock()

        totals, finite, had = (dict.fromkeys(names, 0) for _ in range(3))
        for name, total, count, number in zip(names, sums, counts, steps, strict=True):
            totals[name], finite[name], had[name] = totals[name] + total, finite[name] + count, had[name] + number
        row = {name: totals[name] / finite[name] if finite[name] else None for name in totals}
        for name in filter(lambda name: name.startswith(NORM), had):
            row[f"skipped_steps_{name.removeprefix(NORM)}"] = had[name] - round(finite[name] / world_size())
        row["images_per_second"] = images_per_step * self.steps / self.seconds
        row["data_wait_share"] = self.waited / self.seconds

        self._set_last(last)
        self._set_bad_steps(streaks)
        self._reset()
        return row

    def state(self) -> dict:
        """What was added since the last row, for a checkpoint between two rows; on all processes together. `last` is
        then that of now."""
        if not self._sums:
            return {}
        sums, counts, last, streaks = self._over_processes()
        self._set_last(last)
        self._set_bad_steps(streaks)
        means, first, groups = [[x / world_size() for x in values] for values in (sums, counts)], 0, []
        for names, (_, _, steps) in self._sums.items():
            mine = slice(first, first := first + len(names))
            groups.append([list(names), *(values[mine] for values in means), steps])
        return {"groups": groups, "bad_steps": self.bad_steps}

    def load_state(self, state: dict) -> None:
        """Go on from a `state`, each process with the mean over those that it is of, so that the row's means are those
        of all its steps; its speeds are of the new ones."""
        for names, *sums_and_counts, steps in state.get("groups", ()):
            sums, counts = (torch.tensor(values, device=self.device) for values in sums_and_counts)
            self._sums[tuple(names)] = sums, counts, steps
        for network, steps in state.get("bad_steps", {}).items():
            self._streaks[network] = torch.tensor(len(steps), device=self.device)
            self._learned[network] = list(steps)

    def _set_last(self, values: list[float]) -> None:
        self.last = dict(zip(self._last[0], [value / world_size() for value in values], strict=True))

    def _set_bad_steps(self, streaks: list[float]) -> None:
        for network, streak in zip(self._streaks, streaks, strict=True):
            good = len(self._learned[network]) - round(streak / world_size())
            self._learned[network] = self._learned[network][good:]
        self.bad_steps = {network: list(steps) for network, steps in self._learned.items()}

    def _over_processes(self) -> list[list[float]]:
        """Sums, counts, the last step's scalars and the streaks, each summed over processes, in one collective."""
        sums, counts, _ = zip(*self._sums.values(), strict=True)
        streaks = torch.stack(list(self._streaks.values())) if self._streaks else torch.zeros(0, device=self.device)
        parts = [torch.cat(sums), torch.cat(counts), self._last[1], streaks]
        together = torch.cat([part.float() for part in parts])
        if world_size() > 1:
            dist.all_reduce(together)
        return [part.tolist() for part in together.split([len(part) for part in parts])]

    def infinite_losses(self) -> list[str]:
        """The losses of the last step before `close` that were not finite, on some process."""
        return [name for name, value in self.last.items() if name.endswith("loss") and not math.isfinite(value)]
