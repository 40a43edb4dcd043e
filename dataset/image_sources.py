"""Sets of images to evaluate: an `.npz`, a data folder, or a folder of image files, all read in batches.

A source has `len()`, `size` (height, width), `name`, and `read(start, stop)` -> images uint8 (B, 3, H, W). Errors name
the file; the flag is the caller's to say (`utils.errors.about`).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.data import ImageData
from dataset.preprocess import SUFFIXES
from utils.errors import InputError, renamed
from utils.images import to_rgb
from utils.npz import CompressedArray, open_npz, release

AHEAD = 4  # batches read in advance


class ImageArray:
    """Images of an array that may lie on disk: uint8 (N, H, W, 3), or (N, 3, H, W) with `channels_last=False`."""

    def __init__(self, array: np.ndarray | CompressedArray, name: str, *, channels_last: bool = True):
        self.array, self.name, self.channels_last = array, name, channels_last
        self.size = tuple(array.shape[1:3] if channels_last else array.shape[2:4])
        self.threads = 1 if isinstance(array, CompressedArray) else AHEAD  # a compressed stream is read in order

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop, uint8 (B, 3, H, W)."""
        block = np.array(self.array[start:stop])
        release(self.array)
        return torch.from_numpy(block).permute(0, 3, 1, 2) if self.channels_last else torch.from_numpy(block)


class ImageFolder:
    """All image files below a folder, in sorted order, of one size."""

    threads = AHEAD

    def __init__(self, folder: Path):
        self.name = str(folder)
        names = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.files = [folder / name for name in sorted(names) if not any(part.startswith(".") for part in name.parts)]
        if not self.files:
            raise InputError(f"no image below {folder}; files named {' '.join(SUFFIXES)} are needed")
        self.size = self._pixels(self.files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop, uint8 (B, 3, H, W)."""
        images = [self._pixels(file) for file in self.files[start:stop]]
        for file, image in zip(self.files[start:stop], images, strict=True):
            if image.shape[:2] != self.size:
                problem = f"{file} has {_by(image.shape[:2])} pixels, the first image {_by(self.size)}"
                advice = "run preprocessing.py and give its data folder"
                raise InputError(f"{problem}; images of one size are needed: {advice}")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _pixels(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return np.asarray(to_rgb(image))
        except Exception as error:  # Pillow's decoders raise what they like
            raise InputError(f"{file} cannot be read as an image ({error})") from error


def open_images(path: str | Path) -> ImageArray | ImageFolder:
    """Open a set of images without reading it.

    Args:
        path: an `.npz` with `arr_0` uint8 (N, H, W, 3), a data folder of preprocessing.py, or a folder of image files.
    Raises:
        InputError: missing, damaged, or of another type, shape or range.
    """
    path = Path(path)
    if (path / "images.npy").is_file():
        with renamed({"--data-dir: ": ""}):  # the caller says which flag
            data = ImageData(path)
        return ImageArray(data.images, str(path), channels_last=False)
    if path.is_dir():
        return ImageFolder(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; an .npz file or a folder of images is needed")
    return images_of_npz(open_npz(path), path)


def images_of_npz(arrays: dict, path: str | Path) -> ImageArray:
    """The images `arr_0` of an opened `.npz`, checked; errors as of `open_images`."""
    needed = "arr_0 uint8 (N, H, W, 3) with values 0..255 is needed"
    if "arr_0" not in arrays:
        raise InputError(f"{path} has no array 'arr_0' but {', '.join(arrays)}; {needed}")
    array = arrays["arr_0"]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise InputError(f"{path}: arr_0 is {array.dtype} {tuple(array.shape)}; {needed}")
    source = ImageArray(array, str(path))
    if source.read(0, min(64, len(source))).max() <= 1:
        raise InputError(f"{path}: arr_0 holds only 0 and 1 in its first images; {needed}")
    return source


def require_size(source: "Source", size: tuple[int, int], whose: str) -> None:
    """Refuse a source whose images have another height and width than `whose`."""
    if tuple(source.size) != tuple(size):
        raise InputError(f"{source.name} has {_by(source.size)} images; {_by(size)} is needed, as {whose}")


class Subset:
    """Some images of a source, by their numbers."""

    def __init__(self, source: "Source", indices: Sequence[int]):
        self.source, self.indices = source, indices
        self.name, self.size, self.threads = source.name, source.size, source.threads

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop of the subset, uint8 (B, 3, H, W)."""
        return torch.cat([self.source.read(index, index + 1) for index in self.indices[start:stop]])


Source = ImageArray | ImageFolder | Subset


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def read_batches(
    source: Source, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's batches (indices int64 (B,), images uint8 (B, 3, H, W)), read in advance by threads.

    Batch k holds the images from k * batch_size on; process r has the batches r, r + world_size, ...
    """
    count = len(source)
    bounds = ((start, min(start + batch_size, count)) for start in range(0, count, batch_size))
    mine = islice(bounds, rank, None, world_size)

    # As one batch is handed out, the next one is asked for: AHEAD of them are on their way, and no more are in memory.
    with ThreadPoolExecutor(source.threads) as pool:
        waiting = deque((b, pool.submit(source.read, *b)) for b in islice(mine, AHEAD))
        while waiting:
            (first, last), images = waiting.popleft()
            yield torch.arange(first, last), images.result()
            waiting.extend((b, pool.submit(source.read, *b)) for b in islice(mine, 1))
