"""What is checked of the training scripts' own steps, on whatever device they find."""

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_ldm_only
import train_repae
import train_vae
from tests.support import small

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}
NETWORKS = ("model", "ema", "vae", "discriminator")


def train(script: str, place, output: Path, name: str, **options) -> None:
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))


def around_steps(monkeypatch, script: str, around: Callable) -> None:
    """Every train_step becomes `around(step, call, nets, optimizers)`, which calls `call` and returns what it gives."""
    inside = SCRIPTS[script].train_step

    def replaced(run, nets, optimizers, data, step, **settings):
        return around(step, lambda: inside(run, nets, optimizers, data, step, **settings), nets, optimizers)

    monkeypatch.setattr(SCRIPTS[script], "train_step", replaced)


def optimizers_of(optimizers) -> dict:
    """{name: Optimizer}; train_ldm_only.py has one alone."""
    return {"opt": optimizers} if hasattr(optimizers, "adamw") else vars(optimizers)


# Comparing two runs of four steps, whose checkpoints are of steps 2 and 4


def loss_distance(output: Path, name: str, other: str, *, without: tuple[str, ...] = ()) -> float:
    """The largest |a - b| / (|b| + 0.1) over the losses of all rows, but for those named in `without`."""
    pairs = zip(small.metrics(output, name), small.metrics(output, other), strict=True)
    keys = [(row, base, key) for row, base in pairs for key in base if key.endswith("loss") and key not in without]
    losses = [(row[key], base[key]) for row, base, key in keys]
    return max(abs(a - b) / (abs(b) + 0.1) for a, b in losses)


def movements(output: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """{network: {tensor: its movement from step 2 to step 4}}, of those tensors that moved."""
    before, after = (small.checkpoint(output, name, step) for step in (2, 4))
    return {
        net: {key: moved for key in before[net] if (moved := (after[net][key] - before[net][key]).cpu()).any()}
        for net in NETWORKS
        if net in before
    }


def movement_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """1 - cosine of two movements of a network, over its parameters that moved in both."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # which would outweigh every parameter
    keys = [key for key in expected if key in found and not key.endswith(buffers)]
    a, b = (torch.cat([moved[key].flatten().double() for key in keys]) for moved in (found, expected))
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item()


# The host never waits


class NoLook(TorchDispatchMode):
    """Refuses what makes the host wait for a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_look():
    """Within it, waiting for a value on the device is an error: CUDA's own, or on a CPU that of `NoLook`."""
    if not torch.cuda.is_available():
        with NoLook():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Memory


def live_bytes() -> int:
    """Of tensors: what CUDA has given out, or on a CPU what the garbage collector sees (it sees all that can grow)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # settles what was freed while a stream still used it, such as a batch
        return torch.cuda.memory_allocated()
    return sum(one.nbytes for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
