"""The image files below a folder: which they are, what else lies there, and how one is opened; for every script.

Nothing here imports torch.
"""

import contextlib
import functools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, PngImagePlugin

from utils.errors import InputError

# What a file may be, whatever its suffix says. Left out: formats that start other programs (EPS), hold documents or
# have no signature by which a damaged file is found out (TGA, PCX).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
ORIENTATION = 0x0112  # EXIF tag; 1: as it lies, 2 to 8: to be turned or mirrored
# Folders of file systems and archivers. They hold thumbnails and copies, and are no class.
_SYSTEM = ("__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")

# Names of top folders that are parts of a data set, not classes; and of what lies beside a folder of images.
SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|data|images|\d+))?", re.IGNORECASE)
_IMAGES = re.compile(r"images?|imgs?|jpegimages", re.IGNORECASE)
_BESIDE = re.compile(r"(labels?|annotations?|masks?|bboxes|imagesets|metadata)([-_ ]?\w*)?", re.IGNORECASE)


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """All suffixes of `FORMATS`, as Pillow has them registered."""
    registered = Image.registered_extensions().items()  # loads all of Pillow's readers
    return tuple(sorted(suffix for suffix, name in registered if name in (*FORMATS, "MPO")))  # MPO: a kind of JPEG


@dataclass
class ImageTree:
    """What lies below a folder.

    Attributes:
        files: the images, relative to `root`, with "/", in the order of their parts.
        folders: all top folders but hidden ones and the system's, sorted, whatever they hold.
        left_out: how many other files of each suffix ("no suffix"), and "hidden" files and folders, and "links back".
    """

    root: Path
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def left_out_text(self) -> str:
        """ "7 .txt, 2 hidden", the most frequent first; "" where nothing was left out."""
        shown = self.left_out.most_common(5)
        rest = self.left_out.total() - sum(count for _, count in shown)
        return ", ".join([f"{count} {kind}" for kind, count in shown] + ([f"{rest} others"] if rest else []))


def walk_images(root: Path) -> ImageTree:
    """All image files below a folder, by their suffix. Links are followed, also to folders; circles are cut.

    Hidden files and folders, and those that a file system keeps for itself (`@eaDir` ...), are not entered.

    Raises:
        InputError: a folder that cannot be read, or no image at all.
    """
    tree = ImageTree(root)
    try:
        _walk(tree, "", ())
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not tree.files:
        found = f" (found: {tree.left_out_text()})" if tree.left_out else ""
        raise InputError(f"no image below {root}{found}; files named {' '.join(image_suffixes())} are needed")
    tree.folders.sort()
    return tree


def _walk(tree: ImageTree, folder: str, ancestors: tuple) -> None:
    """Add what lies below a folder; `ancestors`: (device, inode) of those above."""
    status = (tree.root / folder).stat()
    ancestors = (*ancestors, (status.st_dev, status.st_ino))
    with os.scandir(tree.root / folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name, is_folder = posixpath.join(folder, entry.name), _is_folder(entry)
        is_image = entry.name.lower().endswith(image_suffixes())
        is_system = is_folder and (entry.name.startswith("@") or entry.name in _SYSTEM)
        if entry.name.startswith(".") or is_system:
            tree.left_out["hidden"] += 1
        elif is_folder and _identity(entry) in ancestors:
            tree.left_out["links back"] += 1
        elif is_folder:
            if not folder:
                tree.folders.append(name)
            _walk(tree, name, ancestors)
        elif is_image:
            tree.files.append(name)
        elif not folder and entry.is_symlink() and not Path(entry).exists():
            tree.folders.append(name)  # a class that was linked to and is gone: the others keep their labels
        else:
            tree.left_out[posixpath.splitext(entry.name)[1].lower() or "no suffix"] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(entry: os.DirEntry) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def refuse_splits(tree: ImageTree, *, labelled: bool) -> None:
    """Refuse a folder whose top folders are the parts of a data set, and name the one to give instead.

    Args:
        labelled: top folders would be classes; else their images would only be thrown together.
    Raises:
        InputError: `train` and `val`, or `images` beside `labels`, and no other folder with images.
    """
    holding = {name.split("/", 1)[0] for name in tree.files if "/" in name}
    parts = [name for name in tree.folders if SPLIT.fullmatch(name) or _IMAGES.fullmatch(name)]
    beside = [name for name in tree.folders if _BESIDE.fullmatch(name)]
    if not holding & set(parts) or holding - set(parts) - set(beside):
        return

    # One folder of images alone may be a class, as long as there are no classes in it.
    if labelled:
        nested = any(name.count("/") > 1 for name in tree.files)
        apart = len(parts) + len(beside) > 1 or nested
    else:
        apart = len(holding) > 1
    if apart:
        instead = sorted(holding & set(parts), key=lambda name: (not name.lower().startswith("train"), name))
        found = f"{tree.root} holds {', '.join(sorted({*parts, *beside}))}: parts of a data set, not its classes"
        raise InputError(f"{found}; give {' or '.join(str(tree.root / name) for name in instead)}")


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, its pixels not yet read.

    Raises:
        Exception: of many kinds (Pillow's decoders raise what they like), for a file that is not a whole image.
    """
    # A compressed text or colour profile may be as large as Pillow lets all texts of a PNG be together (64 MB, not 1).
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("empty file")
        with Image.open(file, formats=FORMATS) as image:
            yield image


def asks_for_turn(image: Image.Image) -> bool:
    """Whether the pixels of an image, once read, still are to be turned or mirrored as its EXIF says."""
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged metadata of an image that can be read
        return False
