"""Batches on their way to the device while it still computes with the ones before."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Ahead:
    """A loader's batches, on the device.

    A training step does not wait for the device, so that the next batch is asked for, and sent from page-locked memory
    on a stream of its own, while the device is still busy with the step before.

    Args:
        loader: gives tuples of tensors, on the CPU.
        waited: is told the seconds that each batch was waited for. As the device may be busy meanwhile, their share of
            the time is what slow reading can have cost at the most.
    """

    def __init__(self, loader: Iterator[tuple[Tensor, ...]], device: torch.device, waited: Callable[[float], None]):
        self.loader, self.device, self.waited = loader, device, waited
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        began = time.perf_counter()
        batch = next(self.loader)
        self.waited(time.perf_counter() - began)
        return tuple(x.to(self.device) for x in batch) if self._stream is None else self._sent(batch)

    def _sent(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.cuda.stream(self._stream):
            batch = tuple(x.to(self.device, non_blocking=True) for x in batch)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for x in batch:
            x.record_stream(computing)  # else its memory could be given to the next batch before the step is done
        return batch
