"""Random numbers that depend on what they are for, and on nothing else.

Training draws come from a torch generator seeded by (seed, step, micro-step, purpose), on the training device, for the
global batch; a process takes its slice. Sampling draws come from a NumPy generator for each sample, seeded by (seed,
purpose, sample index): the same bits on every device, whatever the batch or the number of processes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seed_of(*key) -> int:
    """A 63-bit seed from any sequence of numbers and strings."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by a key; CPU and CUDA generators give different numbers for one seed."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Draws:
    """The random draws of one micro-step; every tensor is this process's slice of a draw for the global batch.

    `purpose` keeps draws apart: equal purposes give equal numbers, and a new draw changes none of the others.
    """

    seed: int
    step: int
    micro_step: int
    batch_size: int  # of all processes together
    rank: int
    world_size: int
    device: torch.device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal (batch_size / world_size, *shape)."""
        return self._slice(torch.randn(self.batch_size, *shape, device=self.device, generator=self._generator(purpose)))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform on [0, 1), (batch_size / world_size, *shape)."""
        return self._slice(torch.rand(self.batch_size, *shape, device=self.device, generator=self._generator(purpose)))

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.step, self.micro_step, purpose, device=self.device)

    def _slice(self, x: Tensor) -> Tensor:
        share = self.batch_size // self.world_size
        return x[self.rank * share : (self.rank + 1) * share]


def sample_normal(seed: int, purpose: str, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 (len(indices), *shape) on the CPU; row k depends on (seed, purpose, indices[k]) alone."""
    key = seed_of(seed, purpose)
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices, strict=True):
        _stream(key, index).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out)


def sample_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Uniform labels (len(indices),) int64 in [0, num_classes); each depends on (seed, its index) alone."""
    key = seed_of(seed, "label")
    return torch.tensor([_stream(key, index).integers(num_classes) for index in indices], dtype=torch.int64)


def _stream(key: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([key, index]))  # the fastest in benchmarks/noise.py
