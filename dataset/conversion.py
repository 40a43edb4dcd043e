"""Image files converted by several processes into the rows of one file, in their order and without holes.

Nothing here imports torch, so that the processes start quickly.
"""

import contextlib
import multiprocessing
import signal
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from dataset.image_files import FORMATS
from utils.errors import SIGNALS, InputError, one_line, signals_held_back

# Reads an image file: its pixels, uint8 (3, R, R), and whether EXIF asks for a turn.
Read = Callable[[Path], tuple[np.ndarray, bool]]


class Target(NamedTuple):
    """Where pixels go: rows of equal size in a file, behind its header."""

    path: Path
    header_bytes: int
    row_bytes: int


class Chunk(NamedTuple):
    """What has become of some neighbouring image files.

    Attributes:
        count: of the files.
        skipped: name -> reason, of those that cannot be read.
        turns: how many of the others EXIF asks to turn.
        state: as `files_state`, from before they were read.
    """

    count: int
    skipped: dict[str, str]
    turns: int
    state: int

    @property
    def rows(self) -> int:
        """How many could be read."""
        return self.count - len(self.skipped)


def convert(root: Path, files: list[str], read: Read, target: Target, row: int, num_workers: int) -> Iterator[Chunk]:
    """Write the readable ones of image files to the rows of `target` from `row` on; chunks come in the files' order.

    A chunk comes when its pixels are written, which is not to say that they are on the disk. When the iterator is
    closed the processes end; they end as well, at their next image, when this process is gone.

    Raises:
        InputError: one of the processes was killed.
        OSError: the target cannot be written.
    """
    # Some 16 MB of pixels at a time per process; smaller where there would not be enough chunks for all.
    size = max(1, min(64, 2**24 // target.row_bytes, len(files) // (4 * num_workers)))
    chunks = [files[first : first + size] for first in range(0, len(files), size)]
    todo, busy = iter(range(len(chunks))), {}  # process -> the chunk that it is at
    waiting, converted, written = {}, {}, set()  # chunk -> the process that waits for its row; chunk -> what it became
    turn, given = 0, 0  # the chunk to be written next, and the one to be given away next

    with _processes(min(num_workers, len(chunks)), (root, read, target)) as processes:
        for process, chunk in zip(processes, todo, strict=False):
            busy[process] = chunk
            _send(process, chunks[chunk])
        while given < len(chunks):
            for process in connection.wait(busy):
                message = _received(process, num_workers)
                if isinstance(message, OSError):
                    raise message
                if isinstance(message, Chunk):
                    converted[busy[process]], waiting[busy[process]] = message, process
                else:
                    written.add(busy.pop(process))
                    if (chunk := next(todo, None)) is not None:
                        busy[process] = chunk
                        _send(process, chunks[chunk])

            # Each chunk is written right behind the readable images before it. No deadlock: chunks are begun in order,
            # so that all before one that waits are written or at work.
            while turn in waiting:
                _send(waiting.pop(turn), row)
                row, turn = row + converted[turn].rows, turn + 1
            while given in written:
                yield converted.pop(given)
                given += 1


def _send(process: Connection, message: object) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was killed, which `_received` will say
        process.send(message)


def _received(process: Connection, num_workers: int) -> object:
    try:
        return process.recv()
    except (EOFError, ConnectionResetError):
        problem = f"one of {num_workers} processes was killed, perhaps for want of memory"
        raise InputError(f"--num-workers: {problem}; try fewer") from None


@contextlib.contextmanager
def _processes(count: int, work: tuple) -> Iterator[list[Connection]]:
    """The parent's ends of pipes to processes that run `_work`; they are killed when the block ends."""
    context = multiprocessing.get_context("spawn")  # no surprise from threads of this process, on any platform
    processes, ends = [], []
    try:
        with signals_held_back():
            resource_tracker.ensure_running()  # the first process would start it
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # starting it has let some through again
            for _ in range(count):
                ours, theirs = context.Pipe()
                ends.append(ours)
                processes.append(context.Process(target=_work, args=(theirs, *work)))
                processes[-1].start()
                theirs.close()  # now a process that is gone is the end of its pipe
        yield ends
    finally:
        for process in processes:  # they wait, or are at what nobody will use
            if process.pid is not None:
                process.kill()
                process.join()


def _work(parent: Connection, root: Path, read: Read, target: Target) -> None:
    """Convert the chunks that come, each in four messages: its names, what became of them, its row, that it is written.

    Nothing is written for a parent that is gone: it may have a successor.
    """
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            names = parent.recv()
            state = files_state(root, names)
            images, skipped, turns = [], {}, 0
            for name in names:
                if parent.poll():  # nothing is due before the answer: this is its end
                    return
                try:
                    pixels, turn = read(root / name)
                    images.append(pixels)
                    turns += turn
                except Exception as error:  # damaged files make decoders raise OSError, SyntaxError, zlib.error, ...
                    skipped[name] = _reason(error)
            parent.send(Chunk(len(names), skipped, turns, state))
            row = parent.recv()
            parent.send(_written(images, target, row))


def _written(images: list[np.ndarray], target: Target, row: int) -> OSError | None:
    """Write images to their rows; why that failed, if it did."""
    try:
        if images:
            with target.path.open("r+b") as file:
                file.seek(target.header_bytes + row * target.row_bytes)
                file.write(np.stack(images))
    except OSError as error:
        return error
    return None


def files_state(root: Path, names: list[str]) -> int:
    """A checksum of the sizes and times of files, by which it shows that one was replaced."""
    state = 0
    for name in names:
        try:
            status = (root / name).stat()
            seen = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            seen = "gone"
        state = zlib.crc32(f"{seen}\n".encode(), state)
    return state


def _reason(error: Exception) -> str:
    """One line without the path, so that dataset.json does not depend on where the images lie."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image ({', '.join(FORMATS)})"
    text = getattr(error, "strerror", None) or str(error)
    return one_line(text) or type(error).__name__
