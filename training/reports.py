"""What a run writes for people: rows of scalars, pictures, its log, and the same to a tracker."""

import argparse
import contextlib
import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.trackers import open_trackers
from utils.images import save_png

logger = logging.getLogger(__name__)


class Reports:
    """A run's reports, on rank 0. A disk that is full costs a picture and not the run; rows wait for room.

    Args:
        args: the run's options, of which the tracker's are read.
        folder: of the run.
        start_step: from which the run goes on.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, *, start_step: int):
        self.folder = folder
        self._handlers = _open_log(folder / "log.txt")
        self.trackers = open_trackers(args, folder, start_step=start_step)
        self._unwritten: dict[str, list[str]] = defaultdict(list)  # lines by file

    def row(self, file: str, done: int, row: dict[str, float | None]) -> None:
        """A row to a file, as JSON, which has no NaN and no infinity: null stands for them. Trackers get numbers."""
        known = finite(row)
        self._unwritten[file].append(
            json.dumps({"step": done, **{name: known.get(name) for name in row}}, allow_nan=False) + "\n"
        )
        with _going_on(f"step {done}: its row of {file} waits"):
            _append(self.folder / file, "".join(self._unwritten[file]))
            self._unwritten[file].clear()
        with _going_on(f"step {done}: its row does not reach the tracker", Exception):
            for tracker in self.trackers:
                tracker.log(known, step=done)

    def evaluation(self, file: str, done: int, results: dict[str, float]) -> None:
        """A row of metrics to a file and to the log."""
        self.row(file, done, results)
        logger.info("step %d: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in results.items()))

    def pictures(self, done: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures uint8 (H, W, 3) by name, to `samples/`."""
        for name, picture in pictures.items():
            with _going_on(f"step {done}: the picture of {name} is lost"):
                save_png(picture, self.folder / "samples" / f"{done:07d}-{name}.png")
            with _going_on(f"step {done}: the picture of {name} does not reach the tracker", Exception):
                for tracker in self.trackers:
                    tracker.log_images({name: picture[None]}, step=done)

    def close(self) -> None:
        for file, lines in self._unwritten.items():
            with _going_on(f"{len(lines)} rows of {file} are lost"):
                _append(self.folder / file, "".join(lines))
        with _going_on("the tracker does not end well", Exception):
            for tracker in self.trackers:
                tracker.finish()
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def finite(row: dict[str, float | None]) -> dict[str, float]:
    """What of a row is a number."""
    return {name: value for name, value in row.items() if value is not None and math.isfinite(value)}


def _append(path: Path, lines: str) -> None:
    """At the end of a file, whole or not at all: a disk that fills up half-way through leaves no part of a line."""
    if not lines:
        return
    left = memoryview(lines.encode())
    with path.open("ab", buffering=0) as file:  # a buffer would try again, and fail again, when it is cut or closed
        end = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


@contextlib.contextmanager
def _going_on(loss: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Say what is lost where the block fails; a tracker, which is others' code, may fail by any error."""
    try:
        yield
    except errors as error:
        logger.error("%s (%s); training goes on", loss, getattr(error, "strerror", None) or error)


def _open_log(path: Path) -> list[logging.Handler]:
    """Messages go to this file and to stderr; returns the handlers, for whoever ends the run."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    handlers = [_LogFile(path), logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    for noisy in ("httpx", "filelock", "PIL", "wandb"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return handlers


class _LogFile(logging.FileHandler):
    """A log that a full disk does not disturb: the line is on stderr too."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Lasting:
    """A stream that may be gone: Ctrl-C ends a `| tee`, too, and what is written for nobody is no error."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
