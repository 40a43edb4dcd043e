"""Work that goes on while something else is waited for: a thread one item ahead, and copies on their way."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@contextlib.contextmanager
def ahead(items: Iterable[T], left: threading.Event | None = None) -> Iterator[Iterator[T]]:
    """Make each of the items while the one before is in use, in a thread of its own, and never more than that one.

        with ahead(map(encode, batches)) as encoded:
            for latents in encoded:
                write(latents)

    What uses the items stays in the caller's thread, with its errors and with Ctrl-C. An error in making an item is
    raised where the item would have come. The thread has the caller's CUDA device; gradients, autocast and the like
    are each thread's own, and for what makes the items to set.

    Args:
        left: is set once the block is left. What is being made then is waited for; it may look here to give up.
    """
    as_here = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if _on_cuda() else None
    with ThreadPoolExecutor(1, initializer=as_here) as thread:
        try:
            yield _one_ahead(thread, iter(items))
        finally:
            if left is not None:
                left.set()


def _one_ahead(thread: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    end = object()
    upcoming = thread.submit(next, items, end)
    while (item := upcoming.result()) is not end:
        upcoming = thread.submit(next, items, end)
        yield item


class HostCopy:
    """A tensor's copy on the CPU, begun when it is made: on CUDA in pinned memory, behind the work that is queued."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)  # from CUDA torch takes pinned memory for it
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> Tensor:
        """The copy, once it is whole."""
        while self._arrived is not None and not self._arrived.query():
            time.sleep(0.001)  # event.synchronize() would not hear Ctrl-C
        return self._copy


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting for what is queued there; its memory may change later."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
