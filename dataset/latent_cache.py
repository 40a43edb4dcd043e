"""Cached latents while cache_latents.py writes them: it may be killed, and a restart encodes only what is missing."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from dataset.data import evenly_spaced
from dataset.latents import LatentStatistics
from utils.distributed import rank, world_size
from utils.errors import InputError
from utils.files import read_object, require_disk, sync, write_at, write_json
from utils.locks import JobLock
from utils.npz import open_npy

logger = logging.getLogger(__name__)

ANOTHER = "another VAE, data set or dtype; take another name, or --overwrite"


class LatentCache:
    """A cache of latents while it is being written: `<path>.npy` and `<path>.json` appear when it is whole.

    Until then the rows lie in `<path>.npy.tmp-cache`, with one byte for each finished row in `<path>.done.tmp-cache`,
    so that a killed job goes on where it stopped, with any number of processes and any batch size. The job that is at
    work holds `<path>.lock`. Every process writes its own rows into the same files (not through a memory map: on a
    network file system two machines that write different bytes of one page would undo each other).

    Args:
        path: final name without suffix.
        description: the future `<path>.json` (dataset.data.LatentData lists the keys).
    """

    # What makes two caches the same; the rest may differ, such as where the VAE's file lies.
    IDENTITY = ("vae_sha256", "dataset_fingerprint", "count", "shape", "dtype", "resolution")

    def __init__(self, path: str | os.PathLike, description: dict):
        self.description = description
        self.array_path, self.json_path = Path(f"{path}.npy"), Path(f"{path}.json")
        self._parts = [Path(f"{path}.{kind}.tmp-cache") for kind in ("npy", "done", "json")]
        self.part_array, self.part_done, self.part_json = self._parts
        self._lock = JobLock(Path(f"{path}.lock"))
        self._rows = self._done = None  # from `open` on: the array, mapped; which rows were finished then
        self._done_offset = 0  # of the marks in their file, behind the header
        self._unflushed: list[tuple[int, int]] = []  # rows written and not yet marked: the first, and how many

    def start(self, *, overwrite: bool = False) -> bool:
        """Check what is there and make the temporary files; on rank 0, and then on the others, before all `open`.

        From here on no other job can take this name, until `finish`, `close` or the end of rank 0.

        Returns:
            False when the finished cache is there already, of the same VAE and data set.

        Raises:
            InputError: another cache has this name, finished or not; another job is at work on it; or the disk is too
                small.
        """
        # What can be refused is refused before anything is written.
        if self._is_finished(overwrite) and not any(part.exists() for part in self._parts):
            return False
        self._goes_on(overwrite)
        self._require_disk()
        self._lock_name()
        try:  # once more: another job may have begun or ended meanwhile
            if is_finished := self._is_finished(overwrite):
                self._discard_part()  # left by one that was killed at its very end
                self.close()
            elif not self._goes_on(overwrite):
                self._make_part()
        except BaseException:
            self.close()
            raise
        return not is_finished

    def close(self) -> None:
        """Let other jobs take this name; without effect where `start` has not taken it."""
        self._lock.release()

    def _is_finished(self, overwrite: bool) -> bool:
        """Whether a finished cache of this description needs no work; no other is ever replaced unasked."""
        if overwrite or not self.array_path.exists():
            return False
        if not self._describes_this(self.json_path):
            raise InputError(f"--vae-latents-name: {self.array_path} exists already, of {ANOTHER}")
        return True

    def _goes_on(self, overwrite: bool) -> bool:
        """Whether an unfinished cache goes on, even under `overwrite`; another's gives way to `overwrite` alone."""
        if not all(part.exists() for part in self._parts):
            return False
        is_this = self._describes_this(self.part_json)
        if not (is_this or overwrite):
            raise InputError(f"--vae-latents-name: {self.part_array} is an unfinished cache of {ANOTHER}")
        return is_this and self._is_whole_part()

    def _lock_name(self) -> None:
        if rank() > 0:  # rank 0 has it
            return
        try:
            self._lock.acquire(f"--vae-latents-name: another job is at work on {self.array_path}")
        except OSError as error:
            raise InputError(f"--output-dir: {self.array_path.parent} cannot be written ({error.strerror})") from None

    def _make_part(self) -> None:
        """Both arrays at full length (sparse until rows come), and the description last."""
        if self._describes_this(self.part_json):
            logger.warning("%s is damaged: all latents are encoded anew", self.part_array)
        self._discard_part()
        shape, dtype = tuple(self.description["shape"]), self.description["dtype"]
        open_memmap(self.part_array, "w+", dtype=dtype, shape=shape)
        open_memmap(self.part_done, "w+", dtype=np.uint8, shape=shape[:1])
        write_json(self.part_json, self.description)

    def open(self) -> None:
        """Open the files that `start` made; on every process, and by all before any of them writes."""
        self._rows = open_memmap(self.part_array, "r")
        done = open_memmap(self.part_done, "r")
        self._done, self._done_offset = done.astype(bool), done.offset

    def missing_blocks(self, block_size: int) -> list[range]:
        """Aligned blocks of rows that were not all finished when the cache was opened."""
        count = len(self._done)
        blocks = [range(first, min(first + block_size, count)) for first in range(0, count, block_size)]
        return [block for block in blocks if not self._done[block.start : block.stop].all()]

    def write(self, first: int, mean_std: Tensor) -> None:
        """Put rows (B, 2C, h, w) from `first` on; they count as finished from the next `flush` on.

        Raises:
            InputError: a value is not finite in the cache's dtype.
        """
        rows = mean_std.to(getattr(torch, self.description["dtype"])).numpy()
        if not np.isfinite(rows).all():
            last, dtype = first + len(rows) - 1, self.description["dtype"]
            raise InputError(f"the VAE's latents of images {first} to {last} are not finite in {dtype}")
        write_at(self.part_array, self._rows.offset + first * rows[0].nbytes, np.ascontiguousarray(rows).data)
        self._unflushed.append((first, len(rows)))

    def flush(self) -> None:
        """Mark the rows written so far, which are on the disk, as finished."""
        for first, count in self._unflushed:
            write_at(self.part_done, first + self._done_offset, b"\1" * count)
        self._unflushed.clear()

    def statistics(self, max_rows: int = 50_000) -> tuple[Tensor, Tensor]:
        """Scale and bias of the whole cache, of at most `max_rows` evenly spread rows; on all processes together."""
        statistics = LatentStatistics(self._rows.shape[1] // 2)
        chosen = evenly_spaced(len(self._rows), max_rows)
        for first in range(rank() * 256, len(chosen), world_size() * 256):
            statistics.add(torch.from_numpy(self._rows[chosen[first : first + 256]]))
        return statistics.scale_and_bias()

    def finish(self, **extra: object) -> None:
        """Give the whole cache its names, with `extra` entries in the JSON; on one process, after all have flushed."""
        assert open_memmap(self.part_done, "r").all(), "rows are missing"
        self.array_path.unlink(missing_ok=True)  # an old array must never lie beside the new description
        write_json(self.json_path, self.description | extra)
        self.part_array.replace(self.array_path)
        sync(self.array_path.parent)
        self._discard_part()
        self.close()

    def _describes_this(self, path: Path) -> bool:
        try:
            found = read_object(path)
        except InputError:
            return False
        return all(found.get(key) == self.description[key] for key in self.IDENTITY)

    def _is_whole_part(self) -> bool:
        """Whether the unfinished arrays are as `start` made them."""
        shape, dtype = tuple(self.description["shape"]), np.dtype(self.description["dtype"])
        try:
            rows, done = open_npy(self.part_array), open_npy(self.part_done)
        except InputError:
            return False
        as_made = (rows.shape, rows.dtype, done.shape, done.dtype) == (shape, dtype, shape[:1], np.uint8)
        return as_made and rows.flags.c_contiguous

    def _discard_part(self) -> None:
        for part in reversed(self._parts):  # the description first: the rest is nothing without it
            part.unlink(missing_ok=True)

    def _require_disk(self) -> None:
        size = int(np.prod(self.description["shape"], dtype=np.int64)) * np.dtype(self.description["dtype"]).itemsize
        already = self.part_array.stat().st_blocks * 512 if self.part_array.exists() else 0
        require_disk(self.array_path, max(size - already, 0), f"--output-dir: the latents '{self.array_path.stem}'")
