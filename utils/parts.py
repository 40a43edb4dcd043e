"""Which named part of a step is running, forward or backward: for counting FLOPs, and for timing by part."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Part(NamedTuple):
    """A network's name, or that of what else runs by itself, such as "optimisers"; its forward or backward pass."""

    name: str
    backward: bool = False


OTHER = Part("other")  # whatever has no name


class Parts:
    """Follows a computation through its named parts.

    It hooks modules and tensors, and changes nothing of what they compute: the same parts can be counted by shapes
    alone and timed on a device. The backward pass of a part begins with the gradient of an output, and ends when
    those of all inputs are there, or where another part begins.

        parts = Parts(on_change)
        with parts.module("VAE decode", vae.decoder), parts.method(OTHER.name, optimizer, "backward"):
            train_step(...)

    Args:
        on_change: is told every `Part` that begins to run, `OTHER` among them.
    Attributes:
        running: the part of the moment.
    """

    def __init__(self, on_change: Callable[[Part], object] = lambda part: None):
        self.running = OTHER
        self._on_change = on_change
        self._outer: list[Part] = []  # what runs on when the calls of the moment end

    @contextlib.contextmanager
    def module(self, name: str | Callable[[], str], module: nn.Module) -> Iterator[None]:
        """Within it, calls of this module are a part, and so are the backward passes through them.

        Args:
            name: of the part; or a function that gives it at each call.
        """
        names = []

        def before(module, args):
            names.append(name() if callable(name) else name)
            self._begin(names[-1], args)

        handles = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(lambda module, args, outputs: self._end(names.pop(), outputs)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def method(self, name: str, owner: object, method: str) -> Iterator[None]:
        """Within it, calls of this method of this object are a part.

        The method that starts a backward pass is to be one, of the name `OTHER.name`: what runs after it is then no
        longer taken for a part of that pass.
        """
        inner, instead = getattr(owner, method), vars(owner).get(method)

        @functools.wraps(inner)
        def named(*args, **kwargs):
            self._begin(name, args)
            outputs = inner(*args, **kwargs)
            self._end(name, outputs)
            return outputs

        setattr(owner, method, named)
        try:
            yield
        finally:
            delattr(owner, method)
            if instead is not None:
                setattr(owner, method, instead)

    def _begin(self, name: str, inputs: object) -> None:
        self._outer.append(self.running)
        self._switch(Part(name))
        awaited = _differentiable(inputs)
        gradients = len(awaited)

        def gradient_of_input(_):
            nonlocal gradients
            gradients -= 1
            if gradients == 0 and self.running == Part(name, backward=True):
                self._switch(OTHER)

        for tensor in awaited:
            tensor.register_hook(gradient_of_input)

    def _end(self, name: str, outputs: object) -> None:
        self._switch(self._outer.pop())
        for tensor in _differentiable(outputs) if name != OTHER.name else ():
            tensor.register_hook(lambda _: self._switch(Part(name, backward=True)))

    def _switch(self, part: Part) -> None:
        if part != self.running:
            self.running = part
            self._on_change(part)


def _differentiable(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.requires_grad]
