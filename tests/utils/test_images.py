"""Crops, modes and value ranges, against the public code's numbers and closed forms."""

import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from tests.golden.fill import subsample, synth_image
from tests.support import golden_data
from utils.images import centre_crop, image_grid, save_png, to_rgb, to_signed, to_uint8

ARRAYS, META = golden_data.load("preprocess")
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


@pytest.mark.parametrize("index", range(len(META["images"])))
@pytest.mark.parametrize("size", [64, 256])
def test_centre_crop_has_the_bytes_of_the_public_code(index, size):
    entry = META["images"][index]
    image = synth_image(entry["height"], entry["width"], entry["seed"])
    assert zlib.crc32(image.tobytes()) == entry["input_crc32"]
    crop = centre_crop(Image.fromarray(image), size)
    assert crop.shape == (size, size, 3)
    assert zlib.crc32(crop.tobytes()) == entry[f"crop{size}_crc32" + ("_pillow_13_0_0" if PILLOW_13 else "")]
    if size == 64:
        difference = np.abs(crop.astype(int) - ARRAYS[f"crop64.{index}"])
        assert difference.max() <= (1 if entry["pillow_version_sensitive"] else 0)


def test_centre_crop_refuses_what_would_fill_the_memory():
    with pytest.raises(ValueError, match="elongated: 40000 x 1 would become 10240000 x 256"):
        centre_crop(Image.new("RGB", (40000, 1)), 256)


def test_to_signed_and_to_uint8_match_the_public_code():
    seeds = META["encoder_input"]["seeds"]
    images = torch.from_numpy(np.stack([synth_image(256, 256, s).transpose(2, 0, 1) for s in seeds]))
    assert zlib.crc32(images.numpy().tobytes()) == META["encoder_input"]["crc32"]
    pixels = to_signed(images)
    assert pixels.dtype == torch.float32
    np.testing.assert_array_equal(subsample(pixels, 2048), ARRAYS["vae_input"])

    decoded = torch.from_numpy(ARRAYS["pixels.decoder_out"])
    assert decoded.abs().max() > 1, "the fixture is to reach the clamp"
    np.testing.assert_array_equal(to_uint8(decoded).permute(0, 2, 3, 1).numpy(), ARRAYS["pixels.uint8"])


def test_uint8_round_trip_is_off_by_one_level_at_most():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_signed(levels)[[0, -1]].tolist() == [-1, 1]
    difference = levels.int() - to_uint8(to_signed(levels)).int()
    assert difference.min() >= 0 and difference.max() <= 1  # truncation only loses


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = synth_image(16, 16, 0)


def palette_image(transparency=None):
    image = Image.fromarray(RGB).quantize(32)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


PALETTE_COLOURS = np.reshape(palette_image().getpalette(), (-1, 3))[np.asarray(palette_image())]


def with_alpha(mode, colours):
    return Image.merge(mode, [*Image.fromarray(colours).split(), Image.fromarray(RAMP)])


MODES = {
    "RGB": (Image.fromarray(RGB), RGB),
    "L": (Image.fromarray(RAMP), RAMP),
    "1": (Image.fromarray(RAMP > 100).convert("1"), np.where(RAMP > 100, 255, 0)),
    "LA": (with_alpha("LA", RAMP.T.copy()), RAMP.T),
    "RGBA": (with_alpha("RGBA", RGB), RGB),  # colours under transparent pixels, unblended
    "P": (palette_image(), PALETTE_COLOURS),
    "P-index": (palette_image(3), PALETTE_COLOURS),
    "P-bytes": (palette_image(bytes(range(32))), PALETTE_COLOURS),
    # Four inks without black: the complement of the colours.
    "CMYK": (Image.merge("CMYK", [*Image.fromarray(255 - RGB).split(), Image.new("L", (16, 16), 0)]), RGB),
    # 257 v is the 16-bit form of the 8-bit level v.
    "I;16": (Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP),
    "I": (Image.fromarray(RAMP.astype(np.int32) * 257), RAMP),
    "I;16B": (Image.frombytes("I;16B", (16, 16), (RAMP.astype(">u2") * 257).astype(">u2").tobytes()), RAMP),
    "F": (Image.fromarray(RAMP.astype(np.float32)), RAMP),
    "F-range": (Image.fromarray(np.array([[-5, 300, np.nan, 7.6]], np.float32)), np.array([[0, 255, 0, 8]])),
    "I-range": (Image.fromarray(np.array([[-1, 65535, 70000, 32768]], np.int32)), np.array([[0, 255, 255, 128]])),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("image", "expected"), MODES.values(), ids=MODES)
def test_every_mode_becomes_the_colours_that_it_stands_for(image, expected):
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(converted), expected)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_image_grid_places_images_row_by_row(kind):
    images = np.random.default_rng(0).integers(1, 256, (5, 3, 4, 6), np.uint8)
    grid = image_grid(kind(images), columns=3)
    assert grid.shape == (2 * 4, 3 * 6, 3) and grid.dtype == np.uint8
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        cell = grid[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        np.testing.assert_array_equal(cell, image.transpose(1, 2, 0))
    assert not grid[4:, 12:].any()


def test_a_saved_png_holds_the_same_pixels(tmp_path):
    save_png(RGB, tmp_path / "new" / "grid.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), RGB)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
