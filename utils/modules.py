"""Small tools for torch modules."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters of the modules take no gradient inside; each gets back the `requires_grad` that it had.

    Gradients still flow through the modules to their inputs, also in a backward pass after the block.
    """
    before = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
