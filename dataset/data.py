"""What training reads: the data folder of preprocessing.py, and the latents that cache_latents.py made of it.

A data set here answers `len(data)` and `data.__getitems__(indices)`, which reads one batch as tensors.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError
from utils.files import read_object
from utils.inputs import preprocessing_command, require_data_folder
from utils.npz import open_npy

_LARGEST = 1e38  # about float32's


class ImageData:
    """Images and labels of a data folder, memory-mapped.

    Args:
        folder: written by preprocessing.py.
        resolution: the R that the images must have (None: any).
        num_classes: labels must lie below this (None: any).
    Attributes:
        images: uint8 (N, 3, R, R), memory-mapped. labels: int64 (N,). resolution: R.
        info: contents of dataset.json.
    Raises:
        InputError: no such folder, damaged or mismatched files, another resolution, a label too large.
    """

    def __init__(
        self, folder: str | os.PathLike, *, resolution: int | None = None, num_classes: int | None = None
    ) -> None:
        self.folder = Path(folder)
        require_data_folder(self.folder, resolution)
        self.info = read_object(
            self.folder / "dataset.json", count=int, resolution=int, num_classes=int, class_names=list
        )
        self.images = _open_array(self.folder / "images.npy", (np.uint8,), "(N, 3, R, R)")
        self.labels = np.array(_open_array(self.folder / "labels.npy", (np.int64,), "(N,)"))
        self._check(resolution, num_classes)
        self.resolution = self.images.shape[-1]

    def _check(self, resolution: int | None, num_classes: int | None) -> None:
        # Each file as it should be, and all of one data set.
        count, channels, height, width = self.images.shape
        if channels != 3 or height != width:
            raise InputError(f"{self.folder / 'images.npy'}: shape {self.images.shape}; (N, 3, R, R) is needed")
        counts = {"images.npy": count, "labels.npy": len(self.labels), "dataset.json": self.info.get("count", count)}
        apart = f"--data-dir: the files of {self.folder} do not belong together"
        if len(set(counts.values())) > 1:
            raise InputError(f"{apart}: images per file: {counts}")
        if (said := self.info.get("resolution", height)) != height:
            raise InputError(f"{apart}: resolution {height} in images.npy, {said} in dataset.json")

        # Images and labels as the run asks for them.
        if resolution is not None and resolution != height:
            found = f"the images in {self.folder} are {height} x {height}"
            advice = f"give --resolution {height}, or {preprocessing_command(self.folder, resolution)}"
            raise InputError(f"--resolution: {resolution} was given; {found}: {advice}")
        if self.labels.min() < 0:
            raise InputError(f"{self.folder / 'labels.npy'}: label {self.labels.min()}; labels start at 0")
        largest = int(self.labels.max())
        if num_classes is not None and largest >= num_classes:
            found = f"the largest label in {self.folder} is {largest}"
            raise InputError(f"--num-classes: {num_classes} was given; {found}: at least {largest + 1} is needed")

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, R, R) and labels int64 (B,), in the order asked for."""
        return torch.from_numpy(_take(self.images, indices)), torch.from_numpy(_take(self.labels, indices))

    @property
    def num_classes(self) -> int:
        """The data folder's own number of classes, with or without images: as it says, by names or labels."""
        said = (self.info.get("num_classes") or 0, len(self.info.get("class_names") or ()))
        return max(*said, int(self.labels.max()) + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum that ties cached latents to this data set.

        Over the shape, all labels, all source names, and the middle 4096 bytes of 256 evenly spread images: quick for
        any size, and different for any data set that came about otherwise.
        """
        origin = [self.images.shape, self.info.get("sources"), self.info.get("exif_orientation")]
        digest = hashlib.sha256(json.dumps(origin).encode())
        digest.update(self.labels.tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, 256).astype(np.int64)):
            image = self.images[index].reshape(-1)
            digest.update(image[max(0, image.size // 2 - 2048) :][:4096].tobytes())
        return digest.hexdigest()

    def __reduce__(self):
        return ImageData, (self.folder,)  # a loader process maps the files itself instead of receiving their bytes


class LatentData:
    """Cached latents: mean and std of the VAE's posterior for every image of a data set, memory-mapped.

    Args:
        path: file name without suffix; `<path>.npy` and `<path>.json` are read (written by cache_latents.py).
        data: the data set that the latents must belong to (None: not checked).
    Attributes:
        array: float32 or float16 (N, 2C, h, w), mean then std (`mean_std`), memory-mapped.
        info: contents of the .json: VAE, its checksum and config, latent statistics, data set.
    Raises:
        InputError: no such cache, damaged files, or the cache of another data set.
    """

    def __init__(self, path: str | os.PathLike, data: ImageData | None = None) -> None:
        self.path = Path(path)
        array, info = Path(f"{self.path}.npy"), Path(f"{self.path}.json")
        for file in (array, info):
            if not file.is_file():
                flags = f"--vae-latents-name {self.path.name} --data-dir {self.path.parent} --vae-ckpt-path VAE"
                advice = f"write it with python cache_latents.py {flags}"
                raise InputError(f"--vae-latents-name: {file} does not exist; {advice}")

        # Array and description, of each other and, where a data set is given, of it.
        self.info = read_object(info, count=int)
        self.array = _open_array(array, (np.float32, np.float16), "(N, 2C, h, w)")
        if self.array.shape[1] % 2:
            raise InputError(f"{array}: shape {self.array.shape}; (N, 2C, h, w) with mean and std is needed")
        count = self.info.get("count")
        if count != len(self.array):
            raise InputError(f"{array}: {len(self.array)} latents, but {info.name} counts {count}: cache them again")
        if data is not None and (self.info.get("dataset_fingerprint"), count) != (data.fingerprint, len(data)):
            other = f"of another data set ({count} images) than {data.folder} ({len(data)} images)"
            advice = "run cache_latents.py again with --overwrite"
            raise InputError(f"--vae-latents-name: {array} holds the latents {other}: {advice}")
        if data is not None:
            self._check_statistics(info)

    def _check_statistics(self, file: Path) -> None:
        """Those that training normalises with."""
        channels = self.array.shape[1] // 2
        for name in ("latents_scale", "latents_bias"):
            values = self.info.get(name)
            is_list = isinstance(values, list) and len(values) == channels
            if not (is_list and all(type(value) in (int, float) and abs(value) < _LARGEST for value in values)):
                raise InputError(f"{file}: {name} is no list of {channels} numbers: cache the latents again")

    def __len__(self) -> int:
        return len(self.array)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """mean_std float32 (B, 2C, h, w), in the order asked for."""
        return torch.from_numpy(_take(self.array, indices)).float()

    def __reduce__(self):
        return LatentData, (self.path,)


class LatentsAndLabels:
    """Cached latents with the labels of their images and, for the alignment targets, the images themselves.

    A batch is (mean_std float32 (B, 2C, h, w), images uint8 (B, 3, R, R), labels int64 (B,)); with `with_images=False`,
    which reads no image, (mean_std, labels).
    """

    def __init__(self, latents: LatentData, data: ImageData, *, with_images: bool) -> None:
        self.latents, self.data, self.with_images = latents, data, with_images

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        mean_std = self.latents.__getitems__(indices)
        if self.with_images:
            return mean_std, *self.data.__getitems__(indices)
        return mean_std, torch.from_numpy(_take(self.data.labels, indices))


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Up to `at_most` ascending indices spread evenly over `count` images, whose order is by class."""
    chosen = min(count, at_most)
    return [i * count // chosen for i in range(chosen)]


def _take(array: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """Rows of a memory-mapped array: read in ascending order, which disks prefer, returned in the order asked for."""
    indices = np.asarray(indices, np.int64)
    rows = np.empty((len(indices), *array.shape[1:]), array.dtype)
    for place in np.argsort(indices):
        rows[place] = array[indices[place]]
    return rows


def _open_array(path: Path, dtypes: tuple, shape: str) -> np.ndarray:
    """An array of one of these dtypes, memory-mapped, with at least one row, and with as many axes as `shape` names."""
    array = open_npy(path)
    axes = shape.strip("(,)").count(",") + 1
    if array.dtype not in dtypes or array.ndim != axes or array.size == 0:
        names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise InputError(f"{path}: {array.dtype} {array.shape}; {names} {shape} is needed")
    return array
