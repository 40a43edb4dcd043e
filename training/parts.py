"""The named parts of a training step (utils/parts.py), the same for counting and for timing."""

import contextlib
from collections.abc import Iterable, Sequence

from torch import nn

from models.encoders import Encoder
from models.posterior import TrainableVAE
from models.sit import SiT
from training.optimizer import Optimizer
from utils.parts import OTHER, Parts


def step_parts(
    parts: Parts,
    optimizers: Iterable[Optimizer],
    *,
    encoders: Sequence[Encoder] = (),
    sit: SiT | None = None,
    vae: TrainableVAE | None = None,
    lpips: nn.Module | None = None,
    discriminator: nn.Module | None = None,
) -> contextlib.ExitStack:
    """Within it, `parts` follows a training step through these networks, as they are unwrapped, and the optimisers."""
    stack = contextlib.ExitStack()
    for encoder in encoders:
        stack.enter_context(parts.module(encoder.name, encoder))
    if vae is not None:
        stack.enter_context(parts.method("VAE encode", vae, "encode"))
        stack.enter_context(parts.method("VAE decode", vae, "decode"))
    if lpips is not None:
        stack.enter_context(parts.module("LPIPS", lpips))
    if discriminator is not None:
        stack.enter_context(parts.module("discriminator", discriminator))
    if sit is not None:  # under --no-stop-grad the align pass is a whole forward, in evaluation mode
        stack.enter_context(parts.module(lambda: "SiT step" if sit.training else "SiT align pass", sit))
        stack.enter_context(parts.method("SiT align pass", sit, "project"))
    for optimizer in optimizers:
        stack.enter_context(parts.method(OTHER.name, optimizer, "backward"))
        stack.enter_context(parts.method("optimisers", optimizer, "step"))
    return stack
