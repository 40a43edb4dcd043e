"""What a computation costs, counted by shapes alone: FLOPs by part, and memory at its worst moment.

    with shapes_alone():
        network = to_shapes(network)
        with Cost(parts, {"weights": network.parameters()}) as cost:
            network(torch.empty(32, 3, 256, 256)).sum().backward()

A multiply-add is 2 FLOPs. Products alone count (convolutions, matrix products, attention), as is usual for an MFU:
norms, activations and optimisers have next to none. Memory is that of tensors, without workspaces and fragmentation.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from utils.parts import Part, Parts

aten = torch.ops.aten


def _attention(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, **kwargs) -> int:
    # Four products for the forward's two. That a fused kernel computes the scores again is its own affair: so fused and
    # explicit attention count alike.
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


# The CPU's fused attention, which torch's table lacks; shapes alone are computed on a CPU that is not there.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Cost(TorchDispatchMode):
    """Within it, FLOPs are added up by part, and the memory of tensors is followed.

    Args:
        parts: say what is running.
        state: tensors that are there before, by kind, such as "weights".
    Attributes:
        flops: by part.
        peak: bytes by kind at the moment of the highest sum; what is made on the way is "activations", or "autocast
            copies" of weights, or "gradients" where `add` was told so.
        peak_part: which part was running then.
    """

    def __init__(self, parts: Parts, state: dict[str, Iterable[Tensor]]):
        super().__init__()
        self.parts = parts
        self.flops: Counter[Part] = Counter()
        self.live: Counter[str] = Counter()
        self.peak, self.peak_part = Counter(), parts.running
        self._storages: dict[int, tuple[weakref.ref, str]] = {}  # by address: each while it is alive
        for kind, tensors in state.items():
            for tensor in tensors:
                self.add(tensor, kind)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (flops := FLOPS.get(func.overloadpacket)) is not None:
            self.flops[self.parts.running] += flops(*args, **kwargs, out_val=out)
        of_weights = func is aten._to_copy.default and self._kind(args[0]) == "weights"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._kind(tensor) is None:
                self.add(tensor, "autocast copies" if of_weights else "activations")
        return out

    def add(self, tensor: Tensor, kind: str) -> None:
        """Follow a tensor's memory until it is freed; one that is followed already changes its kind."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if (known := self._kind(tensor)) is not None:
            self.live[known] -= size

        def gone(_):
            self.live[self._storages.pop(address)[1]] -= size

        self._storages[address] = weakref.ref(storage, gone), kind
        self.live[kind] += size
        if self.live.total() > self.peak.total():
            self.peak, self.peak_part = self.live.copy(), self.parts.running

    def _kind(self, tensor: Tensor) -> str | None:
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]


# Shapes without numbers


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it, tensors on the CPU have a shape and a dtype, and neither numbers nor memory: a forward and a backward
    pass of the largest networks take seconds. Autocast treats norms and softmax as on CUDA."""
    with FakeTensorMode(allow_non_fake_inputs=True), _norms_in_float32():
        yield


def to_shapes(module: nn.Module, device: str = "cpu") -> None:
    """Give a module, of the meta device or any other, parameters and buffers that are shapes; in `shapes_alone`."""
    for inner in module.modules():
        for name, tensor in inner._parameters.items():
            if tensor is not None:
                inner._parameters[name] = nn.Parameter(torch.empty_like(tensor, device=device), tensor.requires_grad)
        for name, tensor in inner._buffers.items():
            inner._buffers[name] = None if tensor is None else torch.empty_like(tensor, device=device)


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """CUDA's autocast computes norms and softmax in float32, and keeps their float32 inputs for the backward pass; the
    CPU's does not. (The losses on CUDA's list stand outside autocast here.) The functions themselves are replaced: a
    TorchFunctionMode would not be there where a backward pass computes activations again."""

    def in_float32(function):
        @functools.wraps(function)
        def cast(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            return function(*args, **kwargs)

        return cast

    places = [(F, "group_norm"), (F, "layer_norm"), (F, "softmax"), (torch, "softmax"), (Tensor, "softmax")]
    own = [(owner, name, vars(owner).get(name)) for owner, name in places]
    try:
        for owner, name in places:
            setattr(owner, name, in_float32(getattr(owner, name)))
        yield
    finally:
        for owner, name, function in own:
            delattr(owner, name) if function is None else setattr(owner, name, function)
