"""What is done to any torch module: freezing it for a while, loading it strictly, compiling it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from utils.errors import InputError


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


def load_strictly(module: nn.Module, state: dict, what: str) -> None:
    """`load_state_dict` whose errors are one line that names the first key that does not fit."""
    own = module.state_dict()
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"holds the unknown key {key}" for key in state if key not in own]
    problems += [
        f"has {key} of shape {tuple(state[key].shape)}; {tuple(own[key].shape)} is needed"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{what} {problems[0]}{more}")
    module.load_state_dict(state)


def compile_forward(*modules: nn.Module) -> None:
    """Compile the forward passes of modules in place; hooks, state-dict keys and other methods stay as they are.

    Modules of one class and of equal shapes share their compiled code, so that a transformer waits for one block only.
    Shapes are static: each new one is compiled anew. What cannot be compiled whole is an error, not a slower run.
    """
    for module in modules:
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
