"""The image files below a folder: which they are, what else lies there, and how one is opened; for every script.

Nothing here imports torch.
"""

import contextlib
import functools
import os
import posixpath
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image, JpegImagePlugin, PngImagePlugin

from utils.errors import InputError

# What a file may be, whatever its suffix says. Left out: formats that start other programs (EPS), hold documents or
# have no signature by which a damaged file is found out (TGA, PCX).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
_COSTLY = ("WEBP", "JPEG2000")  # their decoders take some 18 bytes a pixel, others 12 at most
ORIENTATION = 0x0112  # EXIF tag; 1: as it lies, 2 to 8: to be turned or mirrored
# Folders of file systems and archivers. They hold thumbnails and copies, and are no class.
_SYSTEM = ("__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")

# Names of top folders that are parts of a data set, not classes; and of what lies beside a folder of images.
_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|data|images|\d+))?", re.IGNORECASE)
_SPLIT_WORD = r"train(?:ing|val)?|val(?:id(?:ation)?)?|test(?:ing)?|dev|eval(?:uation)?|holdout|pred|unlabell?ed"
_HAS_SPLIT_WORD = re.compile(  # "seg_train", "trainA", "DIV2K_valid_HR"
    rf"(?P<before>.*?[-_ .])??(?P<word>{_SPLIT_WORD})(?:set|data|images?|[AB]|\d.*)?(?:[-_ .].*)?",
    re.IGNORECASE | re.DOTALL,
)
_IMAGES = re.compile(r"images?|imgs?|jpegimages", re.IGNORECASE)
_BESIDE = re.compile(r"(labels?|annotations?|masks?|bboxes|imagesets|metadata)([-_ ]?\w*)?", re.IGNORECASE)
_MOST_KINDS = 100  # of files left out; the record stays small whatever lies there


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
        folders: all top folders but hidden ones, the system's and data folders, sorted, whatever they hold.
        left_out: how many other files of each suffix ("no suffix"; "other": numbers and long ones; "odd suffix": one
            that cannot be printed), and "hidden" files and folders, "data folders", "links back", "broken links", and
            "pipes and devices".
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


def walk_images(root: Path, output: Path | None = None) -> ImageTree:
    """All image files below a folder, by their suffix. Links are followed, also to folders; circles are cut.

    Hidden files and folders, those that a file system keeps for itself (`@eaDir` ...), and data folders of
    preprocessing.py are not entered.

    Args:
        output: a folder that is to become a data folder; it counts as one.
    Raises:
        InputError: a folder that cannot be read, no image at all, or images in `output`.
    """
    tree = ImageTree(root)
    try:
        _walk(tree, "", (), output=_identity(output) if output is not None and output.exists() else None)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not tree.files:
        found = f" (found: {tree.left_out_text()})" if tree.left_out else ""
        raise InputError(f"no image below {root}{found}; files named {' '.join(image_suffixes())} are needed")
    tree.folders.sort()
    return tree


def _walk(tree: ImageTree, folder: str, ancestors: tuple, *, output: tuple[int, int] | None) -> None:
    """Add what lies below a folder; `ancestors`: (device, inode) of those above; `output`: of the folder to write."""
    status = (tree.root / folder).stat()
    ancestors = (*ancestors, (status.st_dev, status.st_ino))
    with os.scandir(tree.root / folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    gone_classes = set() if folder else _gone_classes(entries)
    for entry in entries:
        name, is_folder = posixpath.join(folder, entry.name), _is_folder(entry)
        is_image = entry.name.lower().endswith(image_suffixes())
        if _is_hidden(entry):
            tree.left_out["hidden"] += 1
        elif is_folder and _identity(entry) in ancestors:
            tree.left_out["links back"] += 1
        elif is_folder and _is_data_folder(Path(entry)):
            tree.left_out["data folders"] += 1
        elif is_folder and _identity(entry) == output:
            _walk(inside := ImageTree(Path(entry)), "", ancestors, output=None)
            if inside.files:
                raise InputError(f"{Path(entry)} holds images; another --output-path is needed")
            tree.left_out["data folders"] += 1
        elif is_folder:
            files, left_out = len(tree.files), tree.left_out.copy()
            _walk(tree, name, ancestors, output=output)
            only_data = len(tree.files) == files and set(tree.left_out - left_out) == {"data folders"}
            if not folder and not only_data:
                tree.folders.append(name)
        elif is_image and not _is_special(entry):
            tree.files.append(name)
        elif name in gone_classes:
            tree.folders.append(name)
        elif _is_broken(entry):
            tree.left_out["broken links"] += 1
        elif _is_special(entry):
            tree.left_out["pipes and devices"] += 1
        else:
            kind = _kind(entry.name)
            tree.left_out[kind if kind in tree.left_out or len(tree.left_out) < _MOST_KINDS else "other"] += 1


def _gone_classes(entries: list[os.DirEntry]) -> set[str]:
    """Links at the top that lead nowhere and were to class folders: the other classes keep their labels.

    Only where there are no files beside, and without a suffix; else they may have been to files.
    """
    seen = [entry for entry in entries if not _is_hidden(entry)]
    gone = {entry.name for entry in seen if _is_broken(entry) and not posixpath.splitext(entry.name)[1]}
    return gone if all(entry.name in gone or _is_folder(entry) for entry in seen) else set()


def _kind(name: str) -> str:
    """What a file that is left out is counted as; numbers and long suffixes would be as many as there are files."""
    suffix = posixpath.splitext(name)[1].lower()
    if not suffix.isprintable():
        return "odd suffix"
    if suffix[1:].isdecimal() or len(suffix) > 9:
        return "other"
    return suffix or "no suffix"


def _is_data_folder(folder: Path) -> bool:
    """Whether preprocessing.py wrote it."""
    return (folder / "images.npy").is_file() and (folder / "dataset.json").is_file()


def _is_hidden(entry: os.DirEntry) -> bool:
    is_system = entry.name.startswith("@") or entry.name in _SYSTEM
    return entry.name.startswith(".") or (is_system and _is_folder(entry))


def _is_broken(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and not Path(entry).exists()
    except OSError:  # a link to where nothing may be read
        return True


def _is_special(entry: os.DirEntry) -> bool:
    """Neither file nor folder, but there: a pipe, a socket or a device."""
    try:
        return not (entry.is_file() or entry.is_dir() or _is_broken(entry))
    except OSError:  # a link to itself
        return False


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(entry: os.DirEntry | Path) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def folder_of_all(files: list[str]) -> str:
    """The deepest folder that holds all files, relative like them; "" for the root."""
    return posixpath.commonpath({posixpath.dirname(name) for name in files})


def split_names(names: list[str]) -> list[str]:
    """Those of some folders that are named as the parts of a data set: `train` and `val`, `seg_train` and `seg_test`.

    A name that only has such a word in it is one where another is with it, one of them says "train", and they differ in
    the word or after it (`trainA`, `trainB`): `bullet_train` and `steam_train` are classes.
    """
    matches = {name: match for name in names if (match := _HAS_SPLIT_WORD.fullmatch(name))}
    words = {match["word"][:2].lower() for match in matches.values()}  # two letters tell them apart
    prefixes = {match["before"] for match in matches.values()}
    with_word = len(matches) > 1 and "tr" in words and (len(words) > 1 or len(prefixes) == 1)
    return [name for name in names if _SPLIT.fullmatch(name) or (with_word and name in matches)]


def refuse_splits(tree: ImageTree, *, labelled: bool) -> None:
    """Refuse a folder whose top folders are the parts of a data set, and name the one to give instead.

    Where all images are in one folder, the same holds for the folders in that one, and so on.

    Args:
        labelled: top folders would be classes; else their images would only be thrown together.
    Raises:
        InputError: `train` and `val`, or `images` beside `labels`, and no other folder with images.
    """
    _refuse_parts(tree, labelled)
    inner = folder_of_all(tree.files)
    for depth in range(1, len(inner.split("/")) + 1 if inner else 1):
        folder = "/".join(inner.split("/")[:depth])
        files = [name[len(folder) + 1 :] for name in tree.files]
        folders = sorted({name.split("/", 1)[0] for name in files if "/" in name})
        _refuse_parts(ImageTree(tree.root / folder, files, folders), labelled)


def _refuse_parts(tree: ImageTree, labelled: bool) -> None:
    holding = {name.split("/", 1)[0] for name in tree.files if "/" in name}
    parts = [*split_names(tree.folders), *(name for name in tree.folders if _IMAGES.fullmatch(name))]
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
        instead = sorted(holding & set(parts), key=lambda name: ("train" not in name.lower(), name))
        found = f"{tree.root} holds {', '.join(sorted({*parts, *beside}))}: parts of a data set, not its classes"
        raise InputError(f"{found}; give {' or '.join(str(tree.root / name) for name in instead)}")


@contextlib.contextmanager
def open_image(path: Path, at_least: int | None = None) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, its pixels not yet read.

    Args:
        at_least: a JPEG of more pixels than Pillow thinks safe (89 million; at twice as many it refuses) is read at
            half its size, if no side is shorter than this then; None: it is refused.
    Raises:
        Exception: of many kinds (Pillow's decoders raise what they like), for a file that is not a whole image, or one
            that would take more than about 1 GB of memory.
    """
    # A compressed text or colour profile may be as large as Pillow lets all texts of a PNG be together (64 MB, not 1).
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # to open a pipe could take for ever
        raise ValueError("no ordinary file")
    if status.st_size == 0:
        raise ValueError("empty file")
    with path.open("rb") as file, _opened(file, at_least) as image:
        if image.format in _COSTLY and image.width * image.height > Image.MAX_IMAGE_PIXELS // 2:
            raise ValueError(f"a {image.format} of {image.width} x {image.height} takes too much memory")
        yield image


def _opened(file: BinaryIO, at_least: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombWarning:
        file.seek(0)
        if at_least is None or not file.read(3) == b"\xff\xd8\xff":
            raise
        file.seek(0)
        image = JpegImagePlugin.JpegImageFile(file)
        half = image.width // 2, image.height // 2  # half the pixels that Pillow refuses are few enough
        if min(half) < at_least or "progressive" in image.info:  # such a one its decoder keeps whole
            raise
        image.draft(None, half)
        return image


def asks_for_turn(image: Image.Image) -> bool:
    """Whether the pixels of an image, once read, still are to be turned or mirrored as its EXIF says."""
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged metadata of an image that can be read
        return False
