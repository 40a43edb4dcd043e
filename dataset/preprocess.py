"""A tree of image files -> a data folder: which files, which labels, and their pixels, converted in parallel.

Nothing here imports torch, so that worker processes start quickly.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import posixpath
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils.errors import InputError
from utils.files import require_disk, sync
from utils.images import centre_crop, to_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What the files may really be, whatever their suffix says. Left out: formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
DATA_FILES = ("images.npy", "labels.npy", "dataset.json")

logger = logging.getLogger(__name__)


def list_images(root: Path) -> tuple[list[str], list[int], list[str]]:
    """The image files below `root`, in sorted order, with their labels.

    Labels come from `root/dataset.json` in StyleGAN form, `{"labels": [[path, index], ...]}` (null: all 0), if it is
    there; else from the top folder of each file, in sorted order; else, with all files in `root` itself, they are 0.
    Hidden files and folders are ignored, links are followed.

    Returns:
        file names relative to `root`, with "/"; their labels; the class names (none unless folders name them).
    Raises:
        InputError: no folder, no image, or labels that do not fit the files.
    """
    if not root.is_dir():
        raise InputError(f"--imagenet-path: {root} is not a folder; a folder tree of images is needed")
    try:
        files = list(_walk(root, "", ()))
    except OSError as error:
        raise InputError(f"--imagenet-path: {error.filename} cannot be read: {error.strerror}") from error
    if not files:
        raise InputError(f"--imagenet-path: no image below {root}; files named {' '.join(SUFFIXES)} are needed")

    # Labels by a file.
    if (root / "dataset.json").exists():
        labels = _labels_from_json(root / "dataset.json", files)
        if labels is not None:
            return files, labels, []

    # None, or by the top folders.
    loose = [name for name in files if "/" not in name]
    if len(loose) == len(files):
        return files, [0] * len(files), []
    if loose:
        found = f"{len(loose)} images lie beside the class folders in {root} (first: {loose[0]})"
        raise InputError(f"--imagenet-path: {found}; either all or none may")
    class_names = sorted({name.split("/", 1)[0] for name in files})
    index = {name: i for i, name in enumerate(class_names)}
    return files, [index[name.split("/", 1)[0]] for name in files], class_names


def _walk(root: Path, folder: str, ancestors: tuple) -> Iterator[str]:
    """Image files below `root / folder`, relative to `root`; `ancestors`: (device, inode) of the folders above."""
    status = (root / folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link that leads back up
        return
    with os.scandir(root / folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = posixpath.join(folder, entry.name)
        if entry.is_dir():
            yield from _walk(root, name, (*ancestors, identity))
        elif entry.name.lower().endswith(SUFFIXES):
            yield name


def _labels_from_json(path: Path, files: list[str]) -> list[int] | None:
    """Labels of `files`; None if the JSON is not in StyleGAN form."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(info, dict) or "labels" not in info:
        logger.warning("%s has no 'labels' and is ignored; classes are the top folders", path)
        return None
    if info["labels"] is None:
        return [0] * len(files)

    # File name -> label, each entry in form.
    form = f'{path}: {{"labels": [[path, index], ...]}} with whole numbers >= 0 is needed'
    labels = {}
    for entry in info["labels"] if isinstance(info["labels"], list) else [None]:
        match entry:
            case [str(name), int(label)] if label >= 0 and not isinstance(label, bool):
                name = posixpath.normpath(name.replace("\\", "/"))
                if labels.setdefault(name, label) != label:
                    raise InputError(f"{path}: {name} has two labels, {labels[name]} and {label}")
            case _:
                raise InputError(f"{form}, not {json.dumps(entry)[:80]}")

    # Every image and nothing else.
    missing = sorted(labels.keys() - set(files))
    if missing:
        strangers = f"{len(missing)} files that are no images in {path.parent}"
        raise InputError(f"{path}: labels {strangers} (first: {missing[0]})")
    unlabelled = [name for name in files if name not in labels]
    if unlabelled:
        raise InputError(f"{path}: {len(unlabelled)} of {len(files)} images have no label (first: {unlabelled[0]})")
    return [labels[name] for name in files]


def read_image(path: Path, resolution: int, exif_orientation: bool = False) -> np.ndarray:
    """An image file of any mode as uint8 (3, R, R), by ADM's centre crop; of an animation, the first frame.

    Raises:
        Exception: of many kinds (Pillow's decoders raise what they like), for a file that is not a whole image, or one
            with more pixels than Pillow thinks safe.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd metadata, from every process
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("empty file")
        with Image.open(file, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image) if exif_orientation else image
            return np.ascontiguousarray(centre_crop(to_rgb(image), resolution).transpose(2, 0, 1))


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
    root: Path,
    files: list[str],
    labels: list[int],
    class_names: list[str],
    *,
    resolution: int,
    num_workers: int,
    stop_on_error: bool = False,
    exif_orientation: bool = False,
) -> list[dict[str, str]]:
    """Convert `files` into `output`, whose three data files appear when all of them are whole, or not at all.

    Args:
        output: the data folder; its own files are replaced, others stay.
        root, files, labels, class_names: from `list_images`.
        resolution: images become R x R.
        num_workers: processes; the result does not depend on it.
        stop_on_error: an unreadable image is an error; else it is left out.
        exif_orientation: turn images as their EXIF tag says.
    Returns:
        the images left out: [{"file": name, "reason": why}, ...].
    Raises:
        InputError: disk too small, an unreadable image with `stop_on_error`, or no readable one. Nothing is written.
    """
    size = len(files) * (3 * resolution**2 + 8) + sum(map(len, files))  # pixels, labels, names
    require_disk(output, size, f"--output-path: {len(files)} images of {resolution} x {resolution}")
    with _appear_together(output) as partial_files:
        # Pixels first: which images can be read decides over everything else.
        read = partial(read_image, resolution=resolution, exif_orientation=exif_orientation)
        skipped = _write_images(partial_files["images.npy"], root, files, read, resolution, num_workers, stop_on_error)
        kept = [i for i, name in enumerate(files) if name not in skipped]
        if not kept:
            name, reason = next(iter(skipped.items()))
            raise InputError(f"--imagenet-path: none of {len(files)} images is readable (first: {name}: {reason})")

        with partial_files["labels.npy"].open("wb") as file:
            np.save(file, np.array([labels[i] for i in kept], np.int64))
        info = {
            "format": 1,
            "class_names": class_names,
            "resolution": resolution,
            "count": len(kept),
            "exif_orientation": exif_orientation,
            "skipped": [{"file": name, "reason": reason} for name, reason in skipped.items()],
            "sources": [files[i] for i in kept],
        }
        partial_files["dataset.json"].write_text(json.dumps(info, indent=1) + "\n")
    return info["skipped"]


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
) -> dict[str, str]:
    """Write images.npy without holes; return name -> reason of the unreadable ones, in order."""
    # Room for all files: which of them are images is known at the end, and then the file is cut.
    header, row_bytes = _npy_header(len(files), resolution), 3 * resolution**2
    with path.open("wb") as file:
        file.truncate(len(header) + len(files) * row_bytes)

    # Some 16 MB of pixels at a time per process; smaller where there would not be enough chunks for all.
    chunk_size = max(1, min(64, 2**24 // row_bytes, len(files) // (4 * num_workers)))
    chunks = [files[first : first + chunk_size] for first in range(0, len(files), chunk_size)]

    convert = partial(_convert_chunk, root=root, read=read, target=path, offset=len(header))
    skipped = {}
    with _process_pool(num_workers, tasks=len(chunks)) as pool:
        with _interrupts_held_back():  # processes inherit it: they end the chunks they are at when this one is stopped
            results = pool.map(convert, range(len(chunks)), chunks)
        with tqdm(total=len(files), unit="image", desc="preprocessing", disable=None) as progress:
            for chunk, failures in zip(chunks, results, strict=True):
                skipped.update(failures)
                if failures and stop_on_error:
                    name, reason = failures[0]
                    raise InputError(f"--on-error stop: {root / name}: {reason}")
                progress.update(len(chunk))

    count = len(files) - len(skipped)
    with path.open("r+b") as file:
        file.write(_npy_header(count, resolution))
        file.truncate(len(header) + count * row_bytes)
    return skipped


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
) -> list[tuple[str, str]]:
    """Write the readable images of chunk number `chunk` to their rows; return (name, reason) of the others."""
    images, failures = [], []
    for name in names:
        try:
            images.append(read(root / name))
        except Exception as error:  # damaged files make decoders raise OSError, SyntaxError, zlib.error, ...
            failures.append((name, _reason(error)))

    first = _turns.take(chunk, len(images))
    if images:
        with target.open("r+b") as file:
            file.seek(offset + first * images[0].nbytes)
            file.write(np.stack(images))
    return failures


def _reason(error: Exception) -> str:
    """One line without the path, so that dataset.json does not depend on where the images lie."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image ({', '.join(FORMATS)})"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
