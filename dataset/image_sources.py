"""Sets of images to evaluate: an `.npz` or `.npy`, a data folder, or a folder of image files, all read in batches.

A source has `len()`, `size` (height, width), `name`, `read(start, stop)` -> images uint8 (B, 3, H, W), and for whoever
reports a number `notes`: lines on what it leaves out or changes; `turns`: how many of the images read so far EXIF
asks to turn; `value_range`: of floats that it reads. Errors name the file; the flag is the caller's to say
(`utils.errors.about`).
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dataset.data import ImageData
from dataset.image_arrays import AHEAD, ImageArray, Range, images_of_array
from dataset.image_files import asks_for_turn, open_image, refuse_splits, walk_images
from utils.errors import InputError, renamed
from utils.images import to_rgb
from utils.npz import open_npy, open_npz


class ImageFolder:
    """All image files below a folder, in sorted order, of one size."""

    threads, value_range = AHEAD, None

    def __init__(self, folder: Path):
        tree = walk_images(folder)
        refuse_splits(tree, labelled=False)
        self.name, self.files = str(folder), [folder / name for name in tree.files]
        self.notes = [f"{folder}: left out {tree.left_out_text()}"] if tree.left_out else []
        self.size = self._read_one(self.files[0], None)[0].shape[:2]
        self.turns, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop, uint8 (B, 3, H, W)."""
        images, turns = zip(*(self._read_one(file, self.size) for file in self.files[start:stop]), strict=True)
        with self._lock:
            self.turns += sum(turns)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _read_one(self, file: Path, size: tuple[int, int] | None) -> tuple[np.ndarray, bool]:
        """uint8 (H, W, 3) of this size (None: any), and whether EXIF asks for a turn."""
        try:
            with open_image(file) as image:
                found = (image.height, image.width)
                if size in (None, found):  # another is not even decoded: it may be large
                    return np.asarray(to_rgb(image)), asks_for_turn(image)
        except Exception as error:  # Pillow's decoders raise what they like
            raise InputError(f"{file} cannot be read as an image ({error})") from error
        problem = f"{file} has {_by(found)} pixels, the first image {_by(size)}"
        raise InputError(f"{problem}; images of one size are needed: run preprocessing.py and give its data folder")


def open_images(path: str | Path, value_range: Range | None = None) -> ImageArray | ImageFolder:
    """Open a set of images without reading it.

    Args:
        path: an `.npz` with `arr_0`, or an `.npy`, as `images_of_array` takes it; a data folder of preprocessing.py; or
            a folder of image files.
        value_range: what black and white are in arrays of floats.
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
        raise InputError(f"{path} does not exist; an .npz or .npy file or a folder of images is needed")
    if path.suffix == ".npy":
        return images_of_array(open_npy(path), path, "the array", value_range)
    arrays = open_npz(path)
    if "arr_0" not in arrays:
        needed = "arr_0 uint8 (N, H, W, 3) with values 0..255 is needed"
        raise InputError(f"{path} has no array 'arr_0' but {', '.join(arrays)}; {needed}")
    return images_of_array(arrays["arr_0"], path, "arr_0", value_range)


def require_size(source: "Source", size: tuple[int, int], whose: str) -> None:
    """Refuse a source whose images have another height and width than `whose`."""
    if tuple(source.size) != tuple(size):
        raise InputError(f"{source.name} has {_by(source.size)} images; {_by(size)} is needed, as {whose}")


class Subset:
    """Some images of a source, by their numbers."""

    def __init__(self, source: "Source", indices: Sequence[int]):
        self.source, self.indices = source, indices
        self.name, self.size, self.threads = source.name, source.size, source.threads
        self.notes, self.value_range = source.notes, source.value_range

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop of the subset, uint8 (B, 3, H, W)."""
        return torch.cat([self.source.read(index, index + 1) for index in self.indices[start:stop]])

    @property
    def turns(self) -> int:
        return self.source.turns


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
