"""Which named part of a step is running, forward or backward: for counting FLOPs, and for timing by part."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Part(NamedTuple):
    """A network's name, or that of what else runs by itself, such as "optimisers"; its forward or backward pass."""

    name: str
    backward: bool = False


OTHER = Part("other")  # whatever has no name


@dataclass(eq=False)
class _Call:
    """One call of a part, and how many gradients of its inputs are still to come."""

    name: str
    awaited: int


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
        self._backward_of: _Call | None = None  # the call that was last gone back through

    @contextlib.contextmanager
    def module(self, name: str | Callable[[], str], module: nn.Module) -> Iterator[None]:
        """Within it, calls of this module are a part, and so are the backward passes through them.

        Args:
            name: of the part; or a function that gives it at each call.
        """
        calls = []

        def before(module, args):
            calls.append(self._begin(name() if callable(name) else name, args))

        def after(module, args, outputs):
            self._end(calls.pop(), outputs)

        handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
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
            call = self._begin(name, args)
            outputs = inner(*args, **kwargs)
            self._end(call, outputs)
            return outputs

        setattr(owner, method, named)
        try:
            yield
        finally:
            delattr(owner, method)
            if instead is not None:
                setattr(owner, method, instead)

    def _begin(self, name: str, inputs: object) -> _Call:
        call = _Call(name, awaited=len(_differentiable(inputs)))
        self._outer.append(self.running)
        self._switch(Part(name))

        def gradient_of_input(_):
            call.awaited -= 1
            if call.awaited == 0 and self._backward_of is call:
                self._switch(OTHER)

        for tensor in _differentiable(inputs):
            tensor.register_hook(gradient_of_input)
        return call

    def _end(self, call: _Call, outputs: object) -> None:
        self._switch(self._outer.pop())

        def gradient_of_output(_):
            self._backward_of = call
            self._switch(Part(call.name, backward=True))

        for tensor in _differentiable(outputs) if call.name != OTHER.name else ():
            tensor.register_hook(gradient_of_output)

    def _switch(self, part: Part) -> None:
        if part != self.running:
            self.running = part
            self._on_change(part)


def _differentiable(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.requires_grad]
