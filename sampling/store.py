"""Finished samples on disk while a sampling job runs: it may be killed, and a restart draws only what is missing."""

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.files import differences, read_object, require_disk, require_writable, sync, write_at, write_json
from utils.locks import JobLock
from utils.npz import open_npy, write_npz

FLAG = "--sample-dir"


class SampleStore:
    """Images of a job beside its future `.npz`, with a mark for every batch that is finished.

    `<stem>.partial.npy` is the memory-mapped array of all images, `<stem>.partial.done` holds a byte for each batch,
    `<stem>.partial.json` says what the images depend on, and `<stem>.partial.lock` is held by the job that is at work.
    Every process writes its own batches into the same files (not through the map: on a network file system two machines
    that write different bytes of one page would undo each other, and a full disk would kill the process).

    Args:
        target: the final `.npz`.
        count: number of images.
        resolution: their side.
        batch_size: images of a batch; batch k holds the samples from k * batch_size on.
    """

    def __init__(self, target: Path, *, count: int, resolution: int, batch_size: int):
        self.target, self.count, self.batch_size = target, count, batch_size
        self.shape = (count, resolution, resolution, 3)
        self.num_batches = -(-count // batch_size)
        self.images_file, self.done_file, self.job_file = self.partial_files = [
            target.with_name(f"{target.stem}.partial.{kind}") for kind in ("npy", "done", "json")
        ]
        self._lock = JobLock(target.with_name(f"{target.stem}.partial.lock"))

    def check(self, job: dict, *, overwrite: bool = False, others: Sequence[Path] = (), extra_bytes: int = 0) -> None:
        """Find out whether the job may start or go on; nothing is written.

        Args:
            job: everything that the images depend on, as JSON values.
            overwrite: an existing result, or a partial job of other options, may be replaced.
            others: what else the job would write and must not be there, unless it is the job's own of an earlier try.
            extra_bytes: needed on disk for them.

        Raises:
            InputError: a result or a partial job of other options is there, the disk is too small or not writable.
        """
        require_writable(self.target, FLAG)
        if self.target.exists() and not overwrite:
            raise InputError(f"{FLAG}: {self.target} exists already; --overwrite replaces it")
        goes_on = self._is_partial(job)
        if not (goes_on or overwrite):
            if self.job_file.exists() and self._holds_work():
                differing = differences(_given(self._read_job()), _given(job)) or "its files are damaged"
                raise InputError(
                    f"{FLAG}: {self.job_file} is of an interrupted job that this one cannot go on with "
                    f"({differing}); --overwrite discards it"
                )
            for path in filter(Path.exists, others):
                raise InputError(f"{FLAG}: {path} exists already; --overwrite replaces it")
        # The partial array (a sparse file: its blocks come as they are written), and then the .npz beside it.
        there = self.images_file.stat().st_blocks * 512 if self.images_file.is_file() else 0
        needed = 2 * int(np.prod(self.shape, dtype=np.int64)) + extra_bytes - there
        require_disk(self.target, needed, f"{FLAG}: the samples")

    def clear_finished(self, job: dict) -> None:
        """Remove what this job has left beside its result, lock included: it was killed when all was done but that.

        Raises:
            InputError: another job is at work under this name.
        """
        if self.target.exists() and self._lock.path.exists():
            self._lock.acquire(self._taken())
            if not self.job_file.exists() or (self._is_partial(job) and not self.missing()):
                self.discard()  # without their description, which goes first, the others are nothing
            self.release()

    def interrupted(self) -> dict | None:
        """What a partial job of this name depends on, whichever its options are; None: there is none."""
        return self._read_job() if all(file.is_file() for file in self.partial_files) else None

    def create(self, job: dict, **check) -> None:
        """Take up the partial files of the same job, else replace whatever there is by new ones; on one process.

        From here on no other job can take this name, until `release` or the end of the process.

        Args:
            check: as of `check`, which is made again: another job may have begun or ended in between.

        Raises:
            InputError: as `check`; or another job is at work under this name.
        """
        self._lock.acquire(self._taken())
        self.check(job, **check)
        for unfinished in self.target.parent.glob(f"{glob.escape(self.target.name)}.tmp-*"):  # killed in `finish`
            unfinished.unlink()
        if self._is_partial(job):
            return
        self.discard()
        np.lib.format.open_memmap(self.images_file, mode="w+", dtype=np.uint8, shape=self.shape)
        self.done_file.write_bytes(bytes(self.num_batches))
        for file in (self.images_file, self.done_file):
            sync(file)
        write_json(self.job_file, job)  # last: only with it do the files count

    def missing(self) -> list[int]:
        """Batches that are not finished."""
        return [batch for batch, done in enumerate(self.done_file.read_bytes()) if not done]

    def indices(self, batch: int) -> range:
        """Sample numbers of a batch; the last one may be short."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.count))

    def padded_indices(self, batch: int) -> range:
        """As `indices`, but always `batch_size` of them, so that every batch is drawn in the same shape."""
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def read(self, batch: int) -> np.ndarray:
        """The images of a finished batch, uint8 (B, H, W, 3)."""
        indices, images = self.indices(batch), self.images()
        return np.array(images[indices.start : indices.stop])

    def images(self) -> np.memmap:
        """All images as they are on disk now, uint8 (N, H, W, 3)."""
        return open_npy(self.images_file)

    def write(self, batch: int, images: np.ndarray) -> None:
        """Put the images of a batch, uint8 (B, H, W, 3), without those that fill it up; finished once on disk."""
        indices = self.indices(batch)
        images = np.ascontiguousarray(images[: len(indices)])
        expected = (len(indices), *self.shape[1:])
        assert images.dtype == np.uint8 and images.shape == expected, (images.dtype, images.shape, expected)
        write_at(self.images_file, self.images().offset + indices.start * images[0].nbytes, images.data)
        write_at(self.done_file, batch, b"\1")

    def finish(self, labels: np.ndarray) -> None:
        """Write the `.npz` (arr_0 images, arr_1 labels, as guided-diffusion does) and remove the partial files."""
        assert not self.missing(), "not every batch is finished"
        write_npz(self.target, {"arr_0": self.images(), "arr_1": labels})
        self.discard()

    def discard(self) -> None:
        for file in reversed(self.partial_files):  # the job's description first: the rest is nothing without it
            file.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other jobs take this name; on the process that called `create`, and without effect on others."""
        self._lock.release()

    def _taken(self) -> str:
        return f"{FLAG}: another job is at work on {self.target}"

    def _holds_work(self) -> bool:
        """Whether some batch is finished; a job that died before its first one is nobody's loss."""
        return not self.done_file.is_file() or any(self.done_file.read_bytes())

    def _is_partial(self, job: dict) -> bool:
        """Whether whole partial files of this very job are there."""
        if not all(file.is_file() for file in self.partial_files) or _given(self._read_job()) != _given(job):
            return False
        try:
            images = self.images()
        except InputError:  # truncated
            return False
        as_made = images.shape == self.shape and images.dtype == np.uint8 and images.flags.c_contiguous
        return as_made and self.done_file.stat().st_size == self.num_batches

    def _read_job(self) -> dict:
        try:
            return read_object(self.job_file)
        except InputError:
            return {}


def _given(job: dict) -> dict:
    """A description without what is None in it, as an option that nobody gave and only another version names."""
    nested = {key: _given(value) if isinstance(value, dict) else value for key, value in job.items()}
    return {key: value for key, value in nested.items() if value is not None}
