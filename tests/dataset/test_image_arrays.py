"""Images in arrays: grey, floats of a known range, and those that cannot be meant."""

import numpy as np
import pytest
import torch

from dataset.image_arrays import RANGES, images_of_array
from dataset.image_sources import open_images
from tests.support.evaluation_data import as_images, random_images
from utils.errors import InputError

IMAGES = random_images(100, 8, 1)


def opened(array, value_range=None):
    return images_of_array(array, "f.npz", "arr_0", value_range)


def all_of(source):
    return source.read(0, len(source))


@pytest.mark.parametrize("shape", [(100, 8, 8), (100, 8, 8, 1)])
def test_grey_is_read_as_three_equal_channels_and_said(shape):
    source = opened(IMAGES[..., 0].reshape(shape))
    assert torch.equal(all_of(source), as_images(np.repeat(IMAGES[..., :1], 3, axis=3)))
    assert source.size == (8, 8)
    assert source.notes == [f"f.npz: grey images {shape} are read as RGB of three equal channels"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("name", ["0,1", "-1,1"])
def test_floats_give_back_the_levels_that_they_were(name, dtype):
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    low, high = RANGES[name]
    values = (levels / 255 * (high - low) + low).astype(dtype)
    assert torch.equal(all_of(opened(values, RANGES[name])), as_images(levels))
    if dtype is np.float32:
        assert torch.equal(all_of(opened(values[..., :1], RANGES[name]))[:, :1], as_images(levels)[:, :1])


@pytest.mark.parametrize(
    "values, given, words",
    [
        (
            IMAGES / 255,
            None,
            "arr_0 is float64 (100, 8, 8, 3); uint8 .* or floats and evaluate.py's --samples-range 0,1",
        ),
        (IMAGES / 127.5 - 1, "0,1", "holds values from -1 to 0.9.*; --samples-range says 0 to 1"),
        (IMAGES / 100 - 1, "-1,1", "holds values from -1 to 1.* --samples-range says -1 to 1"),
        (IMAGES / 255, "-1,1", "holds no value below 0; --samples-range says -1,1: is it 0,1?"),
        (np.where(IMAGES % 2, np.nan, 0.5), "0,1", "holds values from nan to nan"),
        (IMAGES.astype(np.float32), "0,1", "holds values from .* to 2"),
    ],
)
def test_floats_of_an_unsaid_or_another_range_are_refused(values, given, words):
    pattern = words.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    with pytest.raises(InputError, match=pattern):
        all_of(opened(values, RANGES.get(given)))


def test_black_images_are_images_but_a_set_of_0_and_1_is_a_wrong_cast(tmp_path):
    dark = IMAGES.copy()
    dark[:99] = 0
    assert torch.equal(all_of(opened(dark)), as_images(dark))
    np.savez_compressed(tmp_path / "dark.npz", arr_0=dark)
    assert torch.equal(all_of(open_images(tmp_path / "dark.npz")), as_images(dark))
    for cast in (IMAGES > 128, np.zeros_like(IMAGES)):
        with pytest.raises(InputError, match="arr_0 holds only 0 and 1, in all its images"):
            opened(cast.astype(np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        IMAGES[0],
        IMAGES[:0],
        IMAGES.transpose(0, 3, 1, 2),
        IMAGES[..., [0, 1, 2, 0]],
        IMAGES.astype(np.int64),
        IMAGES > 5,
        IMAGES.ravel(),
        IMAGES.astype(np.complex64),
    ],
)
def test_arrays_that_are_no_images_are_refused(array):
    for value_range in (None, (0.0, 1.0)):
        with pytest.raises(InputError, match=r"uint8 \(N, H, W, 3\) with values 0..255 is needed"):
            opened(array, value_range)


def test_npy_files_are_mapped_and_damaged_ones_refused(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    np.save(tmp_path / "f.npy", np.asfortranarray(IMAGES))
    for name in "af":
        assert torch.equal(all_of(open_images(tmp_path / f"{name}.npy")), as_images(IMAGES))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    np.savez(tmp_path / "zip.npz", arr_0=IMAGES)
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    for name in ("cut", "zip", "object"):
        with pytest.raises(InputError, match=rf"{name}\.npy: damaged or not a \.npy array"):
            open_images(tmp_path / f"{name}.npy")
