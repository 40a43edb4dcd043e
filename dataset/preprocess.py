"""Labelled image files -> a data folder: their pixels, converted in parallel.

Nothing here imports torch, so that worker processes start quickly.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ImageOps, UnidentifiedImageError
from tqdm import tqdm

from dataset.class_labels import LabelledImages, empty_classes
from dataset.image_files import FORMATS, asks_for_turn, open_image
from utils.errors import InputError, one_line
from utils.files import require_disk, sync
from utils.images import centre_crop, to_rgb

DATA_FILES = ("images.npy", "labels.npy", "dataset.json")

logger = logging.getLogger(__name__)


def read_image(path: Path, resolution: int, exif_orientation: bool = False) -> np.ndarray:
    """An image file of any mode as uint8 (3, R, R), by ADM's centre crop; of an animation, the first frame.

    Raises:
        Exception: of many kinds (Pillow's decoders raise what they like), for a file that is not a whole image, or one
            with more pixels than Pillow thinks safe.
    """
    return _read_image(path, resolution, exif_orientation)[0]


def _read_image(path: Path, resolution: int, exif_orientation: bool) -> tuple[np.ndarray, bool]:
    """The pixels of `read_image`, and whether EXIF asks for a turn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata, from every process
        with open_image(path, at_least=resolution) as image:
            upright = ImageOps.exif_transpose(image) if exif_orientation else image
            pixels = np.ascontiguousarray(centre_crop(to_rgb(upright), resolution).transpose(2, 0, 1))
            return pixels, asks_for_turn(image)


def check_output(output: Path, root: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds a data folder already (unless `overwrite`), or that is the input."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output-path: {output} is a file; a folder is needed")
    if output.resolve() == root.resolve():
        raise InputError(f"--output-path: {output} is the folder of the images; another one is needed")
    existing = [name for name in DATA_FILES if (output / name).exists()]
    if existing and not overwrite:
        advice = "give another folder, or --overwrite"
        raise InputError(f"--output-path: {output} holds {', '.join(existing)} already; {advice}")
    for stale in sorted(output.glob("images.npy.tmp-*")):
        logger.warning("%s was left by a run that was killed; delete it if none is running", stale)


def write_data_folder(
    output: Path,
    images: LabelledImages,
    *,
    resolution: int,
    num_workers: int,
    stop_on_error: bool = False,
    exif_orientation: bool = False,
) -> dict:
    """Convert images into `output`, whose three data files appear when all of them are whole, or not at all.

    Args:
        output: the data folder; its own files are replaced, others stay.
        images: from `list_images`.
        resolution: images become R x R.
        num_workers: processes; the result does not depend on it.
        stop_on_error: an unreadable image is an error; else it is left out.
        exif_orientation: turn images as their EXIF tag says.
    Returns:
        the contents of dataset.json. Where there is something to say, it has `num_classes` (where neither names nor
        labels show it), `left_out` (files that are no images, by suffix), `empty_classes` (as
        `dataset.class_labels.empty_classes`), `exif_turns` (how many images EXIF asks to turn).
    Raises:
        InputError: disk too small, an unreadable image with `stop_on_error`, or no readable one. Nothing is written.
    """
    root, files = images.tree.root, images.files
    size = len(files) * (3 * resolution**2 + 8) + sum(map(len, files))  # pixels, labels, names
    require_disk(output, size, f"--output-path: {len(files)} images of {resolution} x {resolution}")
    with _appear_together(output) as partial_files:
        # Pixels first: which images can be read decides over everything else.
        read = partial(_read_image, resolution=resolution, exif_orientation=exif_orientation)
        target = partial_files["images.npy"]
        skipped, turns = _write_images(target, root, files, read, resolution, num_workers, stop_on_error)
        kept = [i for i, name in enumerate(files) if name not in skipped]
        if not kept:
            name, reason = next(iter(skipped.items()))
            raise InputError(f"--imagenet-path: none of {len(files)} images is readable (first: {name}: {reason})")

        labels = [images.labels[i] for i in kept]
        with partial_files["labels.npy"].open("wb") as file:
            np.save(file, np.array(labels, np.int64))
        info = {
            "format": 1,
            "class_names": images.class_names,
            "resolution": resolution,
            "count": len(kept),
            "exif_orientation": exif_orientation,
            "skipped": [{"file": name, "reason": reason} for name, reason in skipped.items()],
            "sources": [files[i] for i in kept],
        }
        is_shown = images.class_names or max(labels) + 1 == images.num_classes
        notes = {
            "num_classes": None if is_shown else images.num_classes,
            "left_out": dict(sorted(images.tree.left_out.items())),
            "empty_classes": empty_classes(labels, images.num_classes),
            "exif_turns": turns,
        }
        info |= {name: value for name, value in notes.items() if value}
        partial_files["dataset.json"].write_text(json.dumps(info, indent=1) + "\n")
    return info


@contextlib.contextmanager
def _appear_together(output: Path) -> Iterator[dict[str, Path]]:
    """Temporary paths for the data files; they get their names when the block ends, and go when it fails."""
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    partial_files = {name: output / f"{name}.tmp-{os.getpid()}" for name in DATA_FILES}
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield partial_files
        for file in partial_files.values():
            sync(file)
        # dataset.json goes first and comes last: old and new files never look like one data folder.
        (output / "dataset.json").unlink(missing_ok=True)
        for name in DATA_FILES:
            partial_files[name].replace(output / name)
        sync(output)
    except BaseException as error:
        for file in partial_files.values():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"--output-path: {output} cannot be written: {error.strerror or error}") from error
        raise


def _write_images(
    path: Path, root: Path, files: list[str], read: Callable, resolution: int, num_workers: int, stop_on_error: bool
) -> tuple[dict[str, str], int]:
    """Write images.npy without holes; return name -> reason of the unreadable ones, in order, and turns asked for."""
    # Room for all files: which of them are images is known at the end, and then the file is cut.
    header, row_bytes = _npy_header(len(files), resolution), 3 * resolution**2
    with path.open("wb") as file:
        file.truncate(len(header) + len(files) * row_bytes)

    # Some 16 MB of pixels at a time per process; smaller where there would not be enough chunks for all.
    chunk_size = max(1, min(64, 2**24 // row_bytes, len(files) // (4 * num_workers)))
    chunks = [files[first : first + chunk_size] for first in range(0, len(files), chunk_size)]

    convert = partial(_convert_chunk, root=root, read=read, target=path, offset=len(header))
    skipped, turns = {}, 0
    with _process_pool(num_workers, tasks=len(chunks)) as pool:
        with _interrupts_held_back():  # processes inherit it: they end the chunks they are at when this one is stopped
            results = pool.map(convert, range(len(chunks)), chunks)
        with tqdm(total=len(files), unit="image", desc="preprocessing", disable=None) as progress:
            for chunk, (failures, asked) in zip(chunks, results, strict=True):
                skipped.update(failures)
                turns += asked
                if failures and stop_on_error:
                    name, reason = failures[0]
                    raise InputError(f"--on-error stop: {root / name}: {reason}")
                progress.update(len(chunk))

    count = len(files) - len(skipped)
    with path.open("r+b") as file:
        file.write(_npy_header(count, resolution))
        file.truncate(len(header) + count * row_bytes)
    return skipped, turns


def _npy_header(count: int, resolution: int) -> bytes:
    """Of uint8 (count, 3, R, R); numpy pads it so that its length does not depend on `count`."""
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, resolution, resolution)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


@contextlib.contextmanager
def _process_pool(num_workers: int, tasks: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that know whose turn it is to write; tasks that have not begun when the block ends are dropped."""
    context = multiprocessing.get_context("spawn")  # no surprise from threads of this process, on any platform
    start = dict(initializer=_start_worker, initargs=(_Turns(context),))
    pool = ProcessPoolExecutor(min(num_workers, tasks), mp_context=context, **start)
    try:
        yield pool
    except BrokenProcessPool as error:
        problem = f"one of {num_workers} processes was killed, perhaps for want of memory"
        raise InputError(f"--num-workers: {problem}; try fewer") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block ends; in processes that are started inside, for as long as they live."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Turns:
    """Tells each chunk, in their order, at which row to write: right behind the readable images before it."""

    def __init__(self, context) -> None:
        self.condition = context.Condition()
        self.chunk = context.Value("q", 0, lock=False)
        self.row = context.Value("q", 0, lock=False)

    def take(self, chunk: int, rows: int) -> int:
        """The first row of a chunk that has so many readable images, once all chunks before it have taken theirs."""
        # No deadlock: chunks are handed out in order, so that all earlier ones are done or at work.
        with self.condition:
            self.condition.wait_for(lambda: self.chunk.value == chunk)
            first = self.row.value
            self.row.value += rows
            self.chunk.value += 1
            self.condition.notify_all()
            return first


_turns: _Turns  # only in worker processes: a lock reaches them when they start, not with a task


def _start_worker(turns: _Turns) -> None:
    global _turns
    _turns = turns


def _convert_chunk(
    chunk: int, names: list[str], *, root: Path, read: Callable, target: Path, offset: int
) -> tuple[list[tuple[str, str]], int]:
    """Write the readable images of chunk number `chunk` to their rows.

    Returns:
        (name, reason) of the others; how many of the readable ones EXIF asks to turn.
    """
    images, failures, turns = [], [], 0
    for name in names:
        try:
            pixels, turn = read(root / name)
            images.append(pixels)
            turns += turn
        except Exception as error:  # damaged files make decoders raise OSError, SyntaxError, zlib.error, ...
            failures.append((name, _reason(error)))

    first = _turns.take(chunk, len(images))
    if images:
        with target.open("r+b") as file:
            file.seek(offset + first * images[0].nbytes)
            file.write(np.stack(images))
    return failures, turns


def _reason(error: Exception) -> str:
    """One line without the path, so that dataset.json does not depend on where the images lie."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image ({', '.join(FORMATS)})"
    text = getattr(error, "strerror", None) or str(error)
    return one_line(text) or type(error).__name__
