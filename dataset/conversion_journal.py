"""What is finished of a conversion, on disk while it runs: it may be stopped or killed, and a restart does the rest.

Nothing here imports torch.
"""

import json
import logging
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dataset.conversion import Chunk, files_state
from utils.errors import InputError
from utils.files import differences, sync

FLUSH_SECONDS = 20.0  # what a killed job loses at most

logger = logging.getLogger(__name__)


class ConversionJournal:
    """The chunks of image files whose pixels are on the disk, in the files' order and without a gap.

    The first line says what the pixels depend on; each other line is a `dataset.conversion.Chunk` and the number of
    files before it, behind a checksum. A thread flushes the pixels and then adds the lines, so that no converting
    process waits for the disk.

    Args:
        path: of the journal.
        array: the file of the pixels.
        description: what they depend on, as JSON values.

    Attributes:
        count: how many files are finished; skipped: name -> reason, of those among them that cannot be read; turns:
            how many of the others EXIF asks to turn.
    """

    def __init__(self, path: Path, array: Path, description: dict):
        self.path, self.array, self.description = path, array, description
        self.count, self.skipped, self.turns = 0, {}, 0
        self._unflushed: list[str] = []
        self._thread, self._flushed = ThreadPoolExecutor(1), Future()
        self._flushed.set_result(None)

    @property
    def rows(self) -> int:
        """How many images have their pixels in the array."""
        return self.count - len(self.skipped)

    def earlier(self) -> dict | None:
        """The description of the journal that is there; None: there is none, or one in which nothing is finished."""
        if not self.path.is_file():
            return None
        with self.path.open("rb") as file:
            description, first = _value(file.readline()), _value(file.readline())
        return description if first else None

    def require_this_job(self) -> None:
        """Refuse to take the place of another job that has finished something.

        Raises:
            InputError: how it differs.
        """
        earlier = self.earlier()
        if earlier is None or earlier == self.description:
            return
        raise InputError(
            f"--output-path: {self.path} is of an interrupted job that this one cannot go on with "
            f"({differences(earlier, self.description)}); give another folder, or --overwrite, which discards it"
        )

    def begin(self) -> None:
        """Begin an empty journal."""
        self.path.write_text(_line(self.description))
        self.count, self.skipped, self.turns = 0, {}, 0
        self._due = time.monotonic() + FLUSH_SECONDS

    def go_on(self, root: Path, files: list[str]) -> None:
        """Read what is finished of `files` below `root`; from the first one on that has changed since, nothing is."""
        with self.path.open("r+b") as file:
            end = len(file.readline())
            for line in file:
                entry = _value(line)
                if entry is None or entry.pop("first") != self.count:  # cut off, as by a power cut
                    break
                chunk = Chunk(**entry)
                names = files[self.count : self.count + chunk.count]
                if files_state(root, names) != chunk.state:
                    where = f"{names[0]} to {names[-1]} in {root}"
                    logger.warning("%s are not as they were when they were read: converted anew from there on", where)
                    break
                self._count(chunk)
                end += len(line)
            file.truncate(end)
        self._due = time.monotonic() + FLUSH_SECONDS

    def add(self, chunk: Chunk) -> None:
        """Note the next files, whose pixels are written; they are flushed now and then.

        Raises:
            OSError: the disk takes no more.
        """
        self._unflushed.append(_line({"first": self.count, **chunk._asdict()}))
        self._count(chunk)
        if self._flushed.done() and time.monotonic() > self._due:
            self._flush()
            self._due = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        """Flush what is finished.

        Raises:
            OSError: the disk takes no more.
        """
        if self._unflushed:
            self._flush()
        self._thread.shutdown()
        self._flushed.result()

    def discard(self) -> None:
        """Remove the journal."""
        self._thread.shutdown()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        self._flushed.result()  # raises what the one before has met
        lines, self._unflushed = self._unflushed, []
        self._flushed = self._thread.submit(self._bring_to_disk, "".join(lines))

    def _bring_to_disk(self, lines: str) -> None:
        sync(self.array)
        with self.path.open("a") as file:
            file.write(lines)
        sync(self.path)

    def _count(self, chunk: Chunk) -> None:
        self.count += chunk.count
        self.skipped |= chunk.skipped
        self.turns += chunk.turns


def _line(value: dict) -> str:
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _value(line: bytes) -> dict | None:
    """What `_line` has written; None where it is not whole."""
    checksum, _, text = line.partition(b" ")
    is_whole = text.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text[:-1])
    return json.loads(text) if is_whole else None
