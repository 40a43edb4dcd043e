"""Labelled image files -> a data folder: their pixels, converted in parallel.

Nothing here imports torch, so that worker processes start quickly.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from PIL import ImageOps
from tqdm import tqdm

from dataset.class_labels import LabelledImages, empty_classes
from dataset.conversion import Read, Target, convert
from dataset.conversion_journal import ConversionJournal
from dataset.image_files import asks_for_turn, open_image
from utils.errors import InputError
from utils.files import require_disk, sync
from utils.images import centre_crop, to_rgb
from utils.locks import JobLock

DATA_FILES = ("images.npy", "labels.npy", "dataset.json")
STAYS = "the images that are finished stay, and the same command goes on from them"
_PART = ".tmp-preprocessing"  # behind the names of files that are not whole
_JOURNAL = f"images.done{_PART}"
_LOCK = "preprocessing.lock"

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
    """Refuse an output folder that is the input, at which another job is at work, or that holds a data folder already.

    Raises:
        InputError: one of these; the last is none under `overwrite`.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output-path: {output} is a file; a folder is needed")
    if output.resolve() == root.resolve():
        raise InputError(f"--output-path: {output} is the folder of the images; another one is needed")
    JobLock(output / _LOCK).require_free(_at_work(output))
    if (output / "dataset.json").exists() and not (output / f"images.npy{_PART}").exists():
        (output / _JOURNAL).unlink(missing_ok=True)  # of a job that was killed after its last file had its name
    _require_no_data(output, overwrite)


def _require_no_data(output: Path, overwrite: bool) -> None:
    existing = [name for name in DATA_FILES if (output / name).exists()]
    is_unfinished = "dataset.json" not in existing and (output / _JOURNAL).exists()  # killed while they got their names
    if existing and not (overwrite or is_unfinished):
        advice = "give another folder, or --overwrite"
        raise InputError(f"--output-path: {output} holds {', '.join(existing)} already; {advice}")


def write_data_folder(
    output: Path,
    images: LabelledImages,
    *,
    resolution: int,
    num_workers: int,
    overwrite: bool = False,
    stop_on_error: bool = False,
    exif_orientation: bool = False,
) -> dict:
    """Convert images into `output`, whose three data files appear when all of them are whole, or not at all.

    What an interrupted job of the same images and options has finished is not done again. Whatever ends this one before
    its end, a signal, a full disk or an error, leaves what is finished for the next.

    Args:
        output: the data folder; its own files are replaced, others stay.
        images: from `list_images`.
        resolution: images become R x R.
        num_workers: processes; the result does not depend on it.
        overwrite: replace a data folder, and what an interrupted job of other images or options has finished.
        stop_on_error: an unreadable image is an error; else it is left out.
        exif_orientation: turn images as their EXIF tag says.
    Returns:
        the contents of dataset.json. Where there is something to say, it has `num_classes` (where neither names nor
        labels show it), `left_out` (files that are no images, by suffix), `empty_classes` (as
        `dataset.class_labels.empty_classes`), `exif_turns` (how many images EXIF asks to turn).
    Raises:
        InputError: another job is at work there or was interrupted, the disk is too small or full, an unreadable image
            with `stop_on_error`, or no readable one.
    """
    root, files = images.tree.root, images.files
    parts = {name: output / f"{name}{_PART}" for name in DATA_FILES}
    size = len(files) * (3 * resolution**2 + 8) + sum(map(len, files))  # pixels, labels, names
    already = parts["images.npy"].stat().st_blocks * 512 if parts["images.npy"].is_file() else 0
    require_disk(output, size - already, f"--output-path: {len(files)} images of {resolution} x {resolution}")
    with _only_job(output):
        _require_no_data(output, overwrite)  # again: another job may have ended meanwhile
        description = {
            "format": 1,
            "images": f"{len(files)} with names of SHA-256 {_sha256(files)}",
            "resolution": resolution,
            "exif_orientation": exif_orientation,
            "pillow": PIL.__version__,
        }
        journal = ConversionJournal(output / _JOURNAL, parts["images.npy"], description)
        if not overwrite:
            journal.require_this_job()
        with _finished_stays(output, parts, journal):
            # Pixels first: which images can be read decides over everything else.
            read = partial(_read_image, resolution=resolution, exif_orientation=exif_orientation)
            _write_images(output, journal, root, files, read, resolution, num_workers, stop_on_error)
            kept = [i for i, name in enumerate(files) if name not in journal.skipped]
            if not kept:
                name, reason = next(iter(journal.skipped.items()))
                journal.begin()  # it stays of no use
                raise InputError(f"--imagenet-path: none of {len(files)} images is readable (first: {name}: {reason})")
            info = _describe(images, kept, journal, resolution, exif_orientation)
            with parts["labels.npy"].open("wb") as file:
                np.save(file, np.array([images.labels[i] for i in kept], np.int64))
            parts["dataset.json"].write_text(json.dumps(info, indent=1) + "\n")
            _give_names(output, parts)
        journal.discard()
    return info


def _describe(
    images: LabelledImages, kept: list[int], journal: ConversionJournal, resolution: int, exif_orientation: bool
) -> dict:
    """The contents of dataset.json, where the images of indices `kept` are readable."""
    labels = [images.labels[i] for i in kept]
    info = {
        "format": 1,
        "class_names": images.class_names,
        "resolution": resolution,
        "count": len(kept),
        "exif_orientation": exif_orientation,
        "skipped": [{"file": name, "reason": reason} for name, reason in journal.skipped.items()],
        "sources": [images.files[i] for i in kept],
    }
    is_shown = images.class_names or max(labels) + 1 == images.num_classes
    notes = {
        "num_classes": None if is_shown else images.num_classes,
        "left_out": dict(sorted(images.tree.left_out.items())),
        "empty_classes": empty_classes(labels, images.num_classes),
        "exif_turns": journal.turns,
    }
    return info | {name: value for name, value in notes.items() if value}


@contextlib.contextmanager
def _only_job(output: Path) -> Iterator[None]:
    """No other job writes to `output` meanwhile; folders that were made for it and are empty at the end go again."""
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    lock = JobLock(output / _LOCK)
    try:
        lock.acquire(_at_work(output))
        yield
    except OSError as error:
        raise InputError(f"--output-path: {output} cannot be written: {error.strerror or error}") from error
    finally:
        lock.release()
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _at_work(output: Path) -> str:
    return f"--output-path: another job is at work on {output}"


@contextlib.contextmanager
def _finished_stays(output: Path, parts: dict[str, Path], journal: ConversionJournal) -> Iterator[None]:
    """When the block fails, flush what is finished, and say that it stays; where nothing is, nothing stays."""
    try:
        yield
    except BaseException as error:
        if not journal.count:
            journal.discard()
            for part in parts.values():
                part.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # a full disk: what was flushed before stays
            journal.close()
        if isinstance(error, OSError):
            error = InputError(f"--output-path: {output} cannot be written: {error.strerror or error}")
        if isinstance(error, InputError):
            raise InputError(f"{error}; {STAYS}") from None
        raise


def _give_names(output: Path, parts: dict[str, Path]) -> None:
    for part in parts.values():
        sync(part)
    # dataset.json goes first and comes last: old and new files never look like one data folder.
    (output / "dataset.json").unlink(missing_ok=True)
    for name, part in parts.items():
        part.replace(output / name)
    sync(output)


def _write_images(
    output: Path,
    journal: ConversionJournal,
    root: Path,
    files: list[str],
    read: Read,
    resolution: int,
    num_workers: int,
    stop_on_error: bool,
) -> None:
    """Write what is missing of images.npy, without holes; the journal has what cannot be read."""
    header = _npy_header(len(files), resolution)
    target = Target(journal.array, len(header), 3 * resolution**2)
    _take_up(output, journal, target, root, files)
    if stop_on_error and journal.skipped:
        name, reason = next(iter(journal.skipped.items()))
        raise InputError(f"--on-error stop: {root / name}: {reason}")

    missing = files[journal.count :]
    chunks = convert(root, missing, read, target, journal.rows, num_workers)
    progress = tqdm(total=len(files), initial=journal.count, unit="image", desc="preprocessing", disable=None)
    with contextlib.closing(chunks), progress:
        for chunk in chunks:
            if chunk.skipped and stop_on_error:
                name, reason = next(iter(chunk.skipped.items()))
                raise InputError(f"--on-error stop: {root / name}: {reason}")
            journal.add(chunk)
            progress.update(chunk.count)
    journal.close()

    with target.path.open("r+b") as file:
        file.write(_npy_header(journal.rows, resolution))
        file.truncate(target.header_bytes + journal.rows * target.row_bytes)


def _take_up(output: Path, journal: ConversionJournal, target: Target, root: Path, files: list[str]) -> None:
    """Find out what an interrupted job has finished; the array gets room for all files.

    Which of them are images is known at the end, and then the array is cut.
    """
    if journal.earlier() == journal.description:
        if not target.path.exists() and not (output / "dataset.json").exists():  # killed between two names
            with contextlib.suppress(FileNotFoundError):
                (output / "images.npy").replace(target.path)
        journal.go_on(root, files)
        size = target.path.stat().st_size if target.path.exists() else 0
        if size < target.header_bytes + journal.rows * target.row_bytes:
            logger.warning("%s is damaged: all images are converted anew", target.path)
            journal.begin()
    else:
        target.path.unlink(missing_ok=True)
        journal.begin()
    with target.path.open("ab") as file:
        file.truncate(target.header_bytes + len(files) * target.row_bytes)


def _npy_header(count: int, resolution: int) -> bytes:
    """Of uint8 (count, 3, R, R); numpy pads it so that its length does not depend on `count`."""
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, resolution, resolution)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _sha256(names: list[str]) -> str:
    return hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()
