"""Images that lie in an array: colour or grey, uint8 or float of a known range, read in blocks as uint8 RGB."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError
from utils.npz import BLOCK_BYTES, CompressedArray, release

AHEAD = 4  # batches read in advance
BLOCK = 64  # images looked at together, at most
Range = tuple[float, float]  # the values of black and white
RANGES = {"0,1": (0.0, 1.0), "-1,1": (-1.0, 1.0)}  # as --samples-range names them
TOLERANCE = 1e-3  # by which float16 may leave its range


class ImageArray:
    """Images of an array that may lie on disk: colour (N, H, W, 3), or (N, 3, H, W) with `channels_last=False`, or grey
    (N, H, W, 1) or (N, H, W); uint8, or floats in `value_range`.
    """

    turns = 0  # arrays have no EXIF

    def __init__(
        self,
        array: np.ndarray | CompressedArray,
        name: str,
        *,
        channels_last: bool = True,
        value_range: Range | None = None,
    ):
        self.array, self.name, self.channels_last = array, name, channels_last
        self.size = tuple(array.shape[1:3] if channels_last else array.shape[2:4])
        self.threads = 1 if isinstance(array, CompressedArray) else AHEAD  # a compressed stream is read in order
        self.value_range = value_range if array.dtype.kind == "f" else None
        self.is_grey = channels_last and (array.ndim == 3 or array.shape[-1] == 1)
        self.notes = []
        if self.is_grey:
            self.notes.append(f"{name}: grey images {tuple(array.shape)} are read as RGB of three equal channels")
        if self.value_range is not None:
            low, high = self.value_range
            self.notes.append(f"{name}: {array.dtype} values from {low:g} to {high:g} are rounded to levels 0..255")

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start <= i < stop, uint8 (B, 3, H, W).

        Raises:
            InputError: a float outside the range, or not finite.
        """
        block = np.array(self.array[start:stop])
        release(self.array)
        if self.value_range is not None:
            block = self._levels(block, *self.value_range)
        if self.is_grey:
            block = np.repeat(block.reshape(*block.shape[:3], 1), 3, axis=3)
        return torch.from_numpy(block).permute(0, 3, 1, 2) if self.channels_last else torch.from_numpy(block)

    def _levels(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        """Floats -> the nearest of the levels 0..255, so that images divided by 255 are what they were."""
        smallest, largest = values.min(), values.max()
        if not (low - TOLERANCE <= smallest and largest <= high + TOLERANCE):  # also where one is not a number
            found = f"{self.name} holds values from {smallest:.4g} to {largest:.4g}"
            raise InputError(f"{found}; --samples-range says {low:g} to {high:g}")
        levels = (values.astype(np.float64) - low) * (255 / (high - low))
        return np.rint(levels).clip(0, 255).astype(np.uint8)


def images_of_array(
    array: np.ndarray | CompressedArray, path: str | Path, what: str, value_range: Range | None = None
) -> ImageArray:
    """The images in an array of a file, their type, shape and range checked.

    Args:
        array: uint8, or floats with `value_range`: (N, H, W, 3), (N, H, W, 1) or (N, H, W).
        what: its name in messages.
    Raises:
        InputError: another type, shape or range.
    """
    found = f"{path}: {what} is {array.dtype} {tuple(array.shape)}"
    needed = "uint8 (N, H, W, 3) with values 0..255 is needed"
    colour, grey = array.ndim == 4 and array.shape[-1] in (1, 3), array.ndim == 3 and array.shape[-1] not in (1, 3, 4)
    if 0 in array.shape or not (colour or grey) or array.dtype.kind not in "uf":
        raise InputError(f"{found}; {needed} (grey: (N, H, W))")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise InputError(f"{found}; {needed}")
    if array.dtype.kind == "f" and value_range is None:
        raise InputError(f"{found}; {needed}, or floats and evaluate.py's --samples-range 0,1 or -1,1")

    # A set that was cast wrongly shows it only as a whole: any single image may be black.
    source = ImageArray(array, str(path), value_range=value_range)
    if source.value_range is None and not any(block.max() > 1 for block in _blocks(array)):
        raise InputError(f"{path}: {what} holds only 0 and 1, in all its images; {needed}")
    if source.value_range == (-1, 1) and not any(block.min() < 0 for block in _blocks(array)):
        raise InputError(f"{path}: {what} holds no value below 0; --samples-range says -1,1: is it 0,1?")
    return source


def _blocks(array: np.ndarray | CompressedArray) -> Iterator[np.ndarray]:
    image_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    step = max(1, min(BLOCK, BLOCK_BYTES // image_bytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]
        release(array)
