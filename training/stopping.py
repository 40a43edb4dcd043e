"""When a run stops before its end: a signal or --max-hours asks for it, and all processes stop after the same step."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from utils.distributed import PATIENCE, world_size
from utils.errors import REQUEUE, Interrupt, on_signals

SAME_SIGNAL_SECONDS = 5.0  # Ctrl-C reaches a process from the terminal and again from its launcher: that is one signal


class Stopping:
    """What asks a run to stop: SIGTERM, SIGUSR1, Ctrl-C or the clock, of whichever process.

    Args:
        max_hours: since this object was made; None: no limit.
        what_stays: says it where a second signal ends the run at once.
    """

    def __init__(self, max_hours: float | None, what_stays: Callable[[], str]):
        self.ends = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.max_hours, self.what_stays = max_hours, what_stays
        self.cause, self._heard = None, None
        self._asked = None  # the processes' answers to the question of the step before, on their way
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size() > 1 else None

    def listening(self) -> AbstractContextManager[None]:
        """Within it a signal asks the run to stop; a second one ends this process at once, as Ctrl-C does elsewhere."""
        return on_signals(self._hear)

    def _hear(self, number: int, _) -> None:
        now = time.monotonic()
        if self._heard is not None and now - self._heard > SAME_SIGNAL_SECONDS:
            raise Interrupt(self.what_stays(), 130 if number == signal.SIGINT else REQUEUE)
        if self._heard is None:
            self._heard, self.cause = now, signal.Signals(number).name
            with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee`, too
                stops = "stopping after this step, with a checkpoint; another one, later, stops at once"
                os.write(2, f"\n{self.cause}: {stops}\n".encode())

    def agreed(self, *, now: bool = False) -> bool:
        """Whether all processes stop here; each asks after each step.

        The processes' sum is begun now and read after the next step, so that no step waits for it; with `now` it is
        waited for.
        """
        if self.cause is None and self.ends is not None and time.monotonic() > self.ends:
            self.cause = f"--max-hours {self.max_hours:g}"
        if self._group is None:
            return self.cause is not None
        earlier, answers = self._asked, torch.tensor(float(self.cause is not None))
        self._asked = dist.all_reduce(answers, group=self._group, async_op=True), answers
        return _says_so(earlier) or (now and _says_so(self._asked))

    def close(self) -> None:
        """Read the last question's answers; on all processes."""
        _says_so(self._asked)
        self._asked = None


def _says_so(asked: tuple[dist.Work, torch.Tensor] | None) -> bool:
    """Whether some process wants to stop, by the answers to a question; none was asked before the first step."""
    if asked is None:
        return False
    work, answers = asked
    work.wait()
    return answers.item() > 0
