"""Checkpoints written behind the training: copied while it waits, brought to the disk while it goes on."""

import logging
import sys
import threading
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

from utils.background import HostCopy
from utils.checkpoint import write_checkpoint
from utils.checkpoint_files import checkpoint_path, checkpoint_steps
from utils.distributed import from_main
from utils.memory import free_bytes

logger = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints, never two at once, and removes those that it need not keep; on rank 0.

    A checkpoint that cannot be written is one line of the log: training goes on, and the next one is tried. The
    networks' values are copied before `save` returns, on a GPU behind the work that is queued there; only where memory
    has no room for the copy does training wait for the disk.

    Args:
        folder: the run's.
        limit: how many checkpoints stay, the newest; None: all.
        keep_every: those of a multiple of so many steps stay beyond the limit; None: none.
        resumed_from: the step of the checkpoint that the run goes on from, which stays; None: of a fresh run.

    Attributes:
        failure: why the newest checkpoint is not on the disk; None: it is.
    """

    def __init__(self, folder: Path, *, limit: int | None, keep_every: int | None, resumed_from: int | None):
        self.folder, self.limit, self.keep_every, self.resumed_from = folder, limit, keep_every, resumed_from
        self.failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, contents: dict) -> None:
        """Begin to write the checkpoint after so many steps, once the one before is written."""
        self.wait()
        copies = _copies(contents)
        if copies is None:
            self._write(step, contents)
            return
        # A daemon: a second Ctrl-C leaves without it, and an unfinished file never gets its name.
        self._thread = threading.Thread(target=self._write, args=(step, copies), daemon=True, name="checkpoint")
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until what was begun is on the disk, or has failed."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(0.1)  # without a limit it would not hear Ctrl-C
            self._thread = None

    def _write(self, step: int, contents: dict) -> None:
        path = checkpoint_path(self.folder, step)
        try:
            write_checkpoint(path, tree_map(lambda x: x.wait() if isinstance(x, HostCopy) else x, contents))
        except Exception as error:  # in a thread it would be lost
            # A fresh one: the traceback of this one would keep the whole copy alive.
            self.failure = RuntimeError(str(error))
            if isinstance(error, OSError) and error.errno is not None:
                self.failure = OSError(error.errno, error.strerror, str(path))
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            logger.error(
                "step %d: the checkpoint was not written (%s); training goes on, and tries again", step, reason
            )
            return
        self.failure = None
        try:
            self._remove_old(step)
        except OSError as error:
            logger.warning("an old checkpoint stays: %s", error)

    def _remove_old(self, newest: int) -> None:
        there = [step for step in checkpoint_steps(self.folder) if step <= newest]
        for step in set(there) - {self.resumed_from, *those_that_stay(there, self.limit, self.keep_every)}:
            checkpoint_path(self.folder, step).unlink(missing_ok=True)


def require_saved(saver: Saver | None) -> None:
    """Wait until the newest checkpoint is on the disk; what hindered it is an error now, on every process.

    Args:
        saver: of rank 0; the others have none.
    """
    failure = None
    if saver is not None:
        saver.wait()
        failure = saver.failure
    lost = from_main(failure is not None)
    if failure is not None:
        raise failure
    if lost:
        sys.exit(1)  # rank 0 says why


def those_that_stay(steps: list[int], limit: int | None, keep_every: int | None) -> list[int]:
    """Of the steps with a checkpoint, in their order: the newest `limit` (None: all), and multiples of `keep_every`."""
    first = 0 if limit is None else len(steps) - limit
    return [step for i, step in enumerate(steps) if i >= first or (keep_every and step % keep_every == 0)]


def _copies(contents: dict) -> dict | None:
    """The same with a copy of each tensor, on a GPU one on its way; None, and said: there is no memory for it."""
    size = sum(leaf.nbytes for leaf in tree_leaves(contents) if isinstance(leaf, torch.Tensor))
    try:
        if size <= 0.9 * free_bytes():
            return tree_map(lambda leaf: _copy(leaf) if isinstance(leaf, torch.Tensor) else leaf, contents)
        why = f"{size / 1e9:.3g} GB more memory are not there"
    except RuntimeError as error:  # of page-locked memory there may be less than of memory
        why = f"no copy could be made ({error})"
    logger.warning("%s: training waits for the checkpoint's file", why)
    return None


def _copy(tensor: torch.Tensor) -> HostCopy | torch.Tensor:
    return HostCopy(tensor.detach()) if tensor.is_cuda else tensor.detach().clone()
