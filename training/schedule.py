"""Learning rates as functions of the step alone: a resumed run has those of an uninterrupted one, and no state."""

import argparse
import math
from dataclasses import dataclass

from utils.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The share of an optimiser's learning rate at each step: it rises, stays 1, and falls; all of a run share one."""

    kind: str = "constant"  # or how it falls: "linear", "cosine"
    warmup_steps: int = 0  # it is 1 / warmup_steps at step 0, and 1 at the last of these
    decay_start: int = 0  # the last step at 1; at least `warmup_steps`
    end: int = 0  # the first step at `final`; at least `decay_start`
    final: float = 0.0

    def __call__(self, step: int) -> float:
        """The share at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant" or step < self.decay_start:
            return 1.0
        if step >= self.end:
            return self.final
        done = (step - self.decay_start) / (self.end - self.decay_start)
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left

    @property
    def moves(self) -> bool:
        return self.kind != "constant" or self.warmup_steps > 0


CONSTANT = Schedule()


def learning_rate_schedule(args: argparse.Namespace) -> Schedule:
    """What --warmup-steps, --lr-schedule and its companions ask for; it ends with --max-train-steps.

    Raises:
        InputError: flags that do not go together.
    """
    if args.lr_schedule == "constant":
        for flag, given in (("--lr-final", args.lr_final != 0), ("--lr-decay-start", args.lr_decay_start is not None)):
            if given:
                raise InputError(f"{flag} goes with --lr-schedule linear or cosine, which was not given")
        return Schedule(warmup_steps=args.warmup_steps)
    if args.epochs is not None:
        ends = f"--lr-schedule {args.lr_schedule} ends with --max-train-steps"
        raise InputError(f"--epochs: {args.epochs} was given; {ends}, which must say the run's length by itself")
    start = args.warmup_steps if args.lr_decay_start is None else args.lr_decay_start
    if not args.warmup_steps <= start < args.max_train_steps:
        flag = "--warmup-steps" if args.lr_decay_start is None else "--lr-decay-start"
        needed = f"from --warmup-steps ({args.warmup_steps}) to less than --max-train-steps ({args.max_train_steps})"
        raise InputError(f"{flag}: {start} was given; a step {needed} is needed by --lr-schedule {args.lr_schedule}")
    return Schedule(args.lr_schedule, args.warmup_steps, start, args.max_train_steps, args.lr_final)
