"""The order in which training sees a data set: a permutation for every (seed, epoch), shared out to the processes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.errors import InputError, leave_signals_to_the_parent, signals_held_back


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Global batches in a pass over `count` images; the incomplete last one is left out."""
    return count // batch_size


def batches(
    data,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator:
    """This process's share of the training batches, without end.

    Global batch k is a slice of the permutation seeded by (seed, epoch), whatever the number of processes, and each
    process gets its contiguous part of it: the parts of all ranks, one after the other, are the global batch.

    Args:
        data: ImageData, LatentData or LatentsAndLabels.
        batch_size: of the global batch.
        seed: >= 0.
        start: the first k, counted over all epochs; costs nothing, however large.
        num_workers: loader processes; 0 reads in this one. The batches are the same.
        pin_memory: put batches into page-locked memory (CUDA).
    Returns:
        iterator over what `data.__getitems__` returns for batch_size / world_size indices. torch's global random
        state is neither used nor moved.
    Raises:
        InputError: fewer images than one batch, or a batch size that the processes do not divide.
    """
    given = f"--batch-size: {batch_size} was given"
    if batch_size % world_size:
        raise InputError(f"{given}; a multiple of {world_size} (the number of processes) is needed")
    if len(data) < batch_size:
        raise InputError(f"{given}; the data set has {len(data)} images, less than one batch")

    loader = DataLoader(
        data,
        batch_sampler=_Shares(len(data), batch_size, seed, rank, world_size, start),
        collate_fn=_identity,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws a seed for its workers from the training's generator
    )
    with signals_held_back():  # until its processes leave them to this one
        return iter(loader)


def global_batch(count: int, *, batch_size: int, seed: int, number: int) -> list[int]:
    """Which of `count` images are those of global batch `number`, counted over all epochs; all processes' parts."""
    return next(iter(_Shares(count, batch_size, seed, rank=0, world_size=1, start=number)))


class _Shares:
    """Index lists of one process: its part of global batch `start`, `start + 1`, ..."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int, start: int) -> None:
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start
        share = batch_size // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[int]]:
        # No pass is replayed to start in the middle: the order of an epoch is a function of its number.
        epoch, batch = divmod(self.start, batches_per_epoch(self.count, self.batch_size))
        while True:
            # Philox by name: numpy may change what default_rng means.
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            order = generator.permutation(self.count)
            for first in range(batch * self.batch_size, self.count - self.batch_size + 1, self.batch_size):
                whole = order[first : first + self.batch_size]
                yield whole[self.share].tolist()
            epoch, batch = epoch + 1, 0


def _identity(batch):
    return batch  # __getitems__ has collated already; a lambda would not reach spawned workers
