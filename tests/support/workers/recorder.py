"""What one process of a training script sees and does, written down without changing it."""

import contextlib
import hashlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

from training.optimizer import Optimizer
from training.run import Run
from utils.distributed import gather_rows
from utils.rng import Draws


@contextlib.contextmanager
def recording() -> Iterator[dict[str, list]]:
    """Record everything that scripts do inside.

    Yields:
        `draws`: (purpose, tensor) in order. `batches`: this process's. `gradients`: for each optimiser step, before
        clipping, {parameter: (norm, largest difference between processes)}. `weights`: for each checkpoint,
        {entry: checksum} of this process's networks.
    """
    record = {"draws": [], "batches": [], "gradients": [], "weights": []}
    normal, uniform, batches, step, save = Draws.normal, Draws.uniform, Run.batches, Optimizer.step, Run.save

    def note(method):
        def draw(self, purpose, *shape):
            values = method(self, purpose, *shape)
            record["draws"].append((purpose, values.cpu()))
            return values

        return draw

    def noted_batches(self, data):
        for batch in batches(self, data):
            record["batches"].append(tuple(part.cpu() for part in batch))
            yield batch

    def noted_step(self):
        named = zip(self.names, self.parameters, strict=True)
        record["gradients"].append({name: compare(p.grad) for name, p in named if p.grad is not None})
        return step(self)

    def noted_save(self, done, contents):
        entries = contents()
        record["weights"].append({key: checksum(entries[key]) for key in ("model", "ema", "vae") if key in entries})
        save(self, done, contents)

    with contextlib.ExitStack() as stack:
        patches = (
            (Draws, "normal", note(normal)),
            (Draws, "uniform", note(uniform)),
            (Run, "batches", noted_batches),
            (Optimizer, "step", noted_step),
            (Run, "save", noted_save),
        )
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield record


def compare(gradient: torch.Tensor) -> tuple[float, float]:
    """Norm of this process's gradient, and how far apart those of all processes are."""
    rows = gather_rows(gradient.detach().reshape(1, -1).clone())
    return gradient.norm().item(), (rows.amax(0) - rows.amin(0)).max().item() if dist.is_initialized() else 0.0


def checksum(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()
