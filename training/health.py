"""Whether a run is well: the spread of its latents, networks that have stopped learning, the record of a bad step."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dataset.order import global_batch
from models.posterior import TrainableVAE
from models.sit import LatentNorm
from training.reports import finite
from training.run_folder import bad_step_path
from training.window import Window
from utils.checkpoint_files import latest_step
from utils.distributed import rank, world_size
from utils.files import write_json

LEAST_SCALE = 1.0  # of a loss under fp16: it falls below where gradients overflow without end


class LatentSpread:
    """Follows the latents of a VAE as it learns: a collapse shows in their standard deviation.

    Args:
        vae: each forward of it is seen, also through a wrapper.
    """

    def __init__(self, vae: TrainableVAE):
        self._seen: list[Tensor] = []
        vae.register_forward_hook(self._see)

    def _see(self, vae: TrainableVAE, inputs: tuple, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        _, variance, _ = LatentNorm.batch_statistics(outputs[1].detach())  # of z (B, C, h, w)
        self._seen.append(variance.sqrt())

    def scalars(self) -> dict[str, Tensor]:
        """Since the last call, means over the batches of all processes together: `latent_std`, the mean over channels,
        and `latent_std_ratio`, the largest channel's over the smallest's. Nothing where the VAE rested."""
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        std = torch.stack(seen)  # (micro-steps, C)
        ratio = std.amax(dim=1) / std.amin(dim=1)
        return dict(latent_std=std.mean(), latent_std_ratio=ratio.mean())


def require_learning(
    window: Window,
    done: int,
    scales: dict[str, float],
    folder: Path,
    num_images: int,
    args: argparse.Namespace,
    settle: Callable[[], None],
) -> None:
    """End a run in which a network has stopped learning, with a record of its last step.

    Args:
        window: just closed, so that its last step is the last of the row; called on every process.
        done: the number of that step, from 1.
        scales: of each network's loss, under fp16.
        folder: of the run; rank 0 writes `bad-step-<done>.json` there.
        num_images: of the data set.
        settle: waits for a checkpoint that is being written.

    Raises:
        FloatingPointError: of the last steps, --max-bad-steps in a row had a gradient norm of one network that is not
            finite; or a loss scale has fallen below 1.
    """
    why = _what_is_wrong(window.bad_steps, scales, args.max_bad_steps)
    if why is None:
        return
    path, see = bad_step_path(folder, done), ""
    if rank() == 0:
        settle()
        with contextlib.suppress(OSError):  # the reason counts more than its record
            write_json(path, {"step": done, "why": why, **_last_step(window, done, scales, num_images, args)})
            see = f"; see {path}"
    if world_size() > 1:
        dist.barrier()  # a launcher ends the others with the first that leaves
    raise on_all(FloatingPointError(f"step {done}: {why}; {what_now(folder, args)}{see}"))


def on_all(error: FloatingPointError) -> FloatingPointError:
    """An error that all processes meet alike: rank 0 alone says it."""
    error.printed = rank() > 0
    return error


def what_now(folder: Path, args: argparse.Namespace) -> str:
    """For whoever reads that a run's numbers have gone bad: its last checkpoint, and what it could do otherwise."""
    saved = latest_step(folder)
    good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
    steadier = {"fp16": ["--mixed-precision bf16 or no"], "bf16": ["--mixed-precision no"], "no": []}
    tries = [*steadier[args.mixed_precision], "lower learning rates"]
    if not getattr(args, "qk_norm", True):
        tries.append("in a fresh run --qk-norm")
    return f"{good}; to try: {', '.join(tries)}"


def _what_is_wrong(bad_steps: dict[str, list[int]], scales: dict[str, float], max_bad_steps: int) -> str | None:
    reasons = [
        f"the gradient norm of {network} was not finite in {len(steps)} steps in a row, since step {steps[0]}"
        for network, steps in bad_steps.items()
        if len(steps) >= max_bad_steps
    ]
    for network, scale in scales.items():
        if scale < LEAST_SCALE:
            since = f", its gradients not finite since step {steps[0]}" if (steps := bad_steps.get(network)) else ""
            reasons.append(f"the loss scale of {network} has fallen to {scale:g}{since}")
    return "; ".join(reasons) or None


def _last_step(window: Window, done: int, scales: dict[str, float], num_images: int, args) -> dict:
    """All that the step was made of; what is no number, which JSON lacks, is named under `not_finite`."""
    micro_steps, known = args.gradient_accumulation_steps, finite(window.last)
    first = (done - 1) * micro_steps
    order = dict(batch_size=args.batch_size, seed=args.seed)
    return {
        "scalars": {name: known.get(name) for name in window.last},  # means over processes
        "not_finite": {name: _name_of(value) for name, value in window.last.items() if name not in known},
        "bad_steps": {network: steps for network, steps in window.bad_steps.items() if steps},
        "loss_scales": scales,
        "draws": {"seed": args.seed, "step": done - 1, "micro_steps": list(range(micro_steps))},  # of utils.rng.Draws
        "images": [global_batch(num_images, number=number, **order) for number in range(first, first + micro_steps)],
    }


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
