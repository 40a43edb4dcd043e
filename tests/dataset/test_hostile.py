"""Data folders, latents and pictures that are broken or made to do harm: the right value, or one line."""

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.class_labels import list_images
from dataset.data import ImageData, LatentData
from dataset.image_files import open_image, walk_images
from dataset.image_sources import open_images
from dataset.preprocess import read_image
from tests.support.hostile import NAMES, broken, broken_json, npy, outcome
from tests.support.small import run_python, write_data
from utils.errors import InputError

INFO = {"count": 6, "resolution": 8, "num_classes": 4, "class_names": ["a", "b"], "sources": ["x\ny.png"]}
LABELS = {"labels": [["a.png", 0], ["b/c.png", 3]]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data", count=6, resolution=8)


# Data folders and latents


@given(broken_json(INFO))
def test_a_data_folder_with_another_description_is_used_or_refused(data, text):
    (data / "dataset.json").write_bytes(text)
    found = outcome(ImageData, data)
    (data / "dataset.json").write_text(json.dumps(INFO))
    if found is not None:
        assert len(found) == 6 and found.resolution == 8 and found.num_classes >= 4 and len(found.fingerprint) == 64


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@given(file=npy(data=bytes(6 * 3 * 64)))
def test_a_data_folder_with_another_array_is_used_or_refused(data, name, file):
    whole = (data / name).read_bytes()
    (data / name).write_bytes(file)
    outcome(ImageData, data)
    (data / name).write_bytes(whole)
    assert len(ImageData(data)) == 6


@given(st.data())
def test_latents_with_another_description_are_used_or_refused(data, draw):
    whole = ImageData(data)
    np.save(data / "z.npy", np.zeros((6, 4, 2, 2), np.float32))
    scale = {"latents_scale": [1.0, 2.0], "latents_bias": [0.0, 1]}
    text = draw.draw(broken_json({"count": 6, "dataset_fingerprint": whole.fingerprint, **scale}))
    (data / "z.json").write_bytes(text)
    found = outcome(LatentData, data / "z", whole)
    if found is not None:
        assert found.info["count"] == 6 and np.array(found.info["latents_scale"], np.float32).shape == (2,)


# Labels of a tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    (root / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        Image.new("RGB", (4, 4)).save(root / name)
    return root


@given(
    broken_json(LABELS) | st.lists(st.tuples(NAMES, st.integers())).map(lambda x: json.dumps({"labels": x}).encode())
)
def test_labels_of_a_file_are_those_of_the_images_or_one_line(tree, text):
    (tree / "dataset.json").write_bytes(text)
    found = outcome(list_images, tree)
    assert found is None or (found.files == ["a.png", "b/c.png"] and min(found.labels) >= 0)


# Pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [encoded(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
PICTURES += [encoded("JPEG", progressive=True), encoded("TIFF", compression="tiff_lzw")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks
@given(st.sampled_from(PICTURES).flatmap(broken))
def test_a_broken_picture_is_one_line_or_a_picture(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(data)
    found = outcome(open_images, folder)
    if found is not None:
        assert found.read(0, 1).shape == (1, 3, *found.size)


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would block for ever."""
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (tmp_path / "3.png").symlink_to("2.png")
    (tmp_path / "4.png").symlink_to("/dev/zero")
    (tmp_path / "5.jpg").mkdir()
    (tmp_path / "6.png").symlink_to("6.png")
    os.mkfifo(tmp_path / "dataset.json")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "7.png"))
        tree = walk_images(tmp_path)
    assert tree.files == ["1.png", "6.png"] and tree.left_out == {"pipes and devices": 5}
    assert list_images(tmp_path).labels == [0, 0]
    with pytest.raises(ValueError, match="no ordinary file"), open_image(tmp_path / "2.png"):
        pass


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[2J.png", os.fsdecode(b"\xff.png")])
def test_a_name_of_any_characters_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        open_images(tmp_path)
    assert str(caught.value).isprintable() and repr(name)[1:-5] in str(caught.value).replace("\n", "\\n")


def test_a_jpeg_that_is_too_large_is_read_at_half_its_size(tmp_path, monkeypatch):
    """As a camera of 100 megapixels makes them; what else is too large is refused by its size alone."""
    smooth = np.add.outer(np.arange(64), np.arange(96))[..., None].repeat(3, axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    Image.fromarray(smooth).save(tmp_path / "x.png")
    whole = read_image(tmp_path / "x.jpg", 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 96 // 2 + 1)
    assert np.abs(read_image(tmp_path / "x.jpg", 16).astype(int) - whole).max() <= 1
    with open_image(tmp_path / "x.jpg", at_least=32) as image:
        assert image.size == (48, 32)
    for name, at_least in (("x.jpg", None), ("x.jpg", 33), ("x.png", 16)):
        with pytest.raises(Image.DecompressionBombWarning), open_image(tmp_path / name, at_least=at_least):
            pass


def test_other_sizes_than_the_first_are_not_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    Image.new("RGB", (900, 900)).save(tmp_path / "2.png")
    images = open_images(tmp_path)
    monkeypatch.setattr("dataset.image_sources.to_rgb", lambda image: pytest.fail(f"{image.size} is decoded"))
    with pytest.raises(InputError, match=r"2\.png has 900 x 900 pixels, the first image 4 x 4"):
        images.read(1, 2)


PEAK = """
import re, sys
from pathlib import Path
from dataset.preprocess import read_image
read_image(Path(sys.argv[1]), 16)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's account of memory is needed")
def test_a_picture_of_16_bits_takes_little_more_than_its_pixels(tmp_path):
    """8 bytes a pixel as Pillow has it and as RGB; another 8 in float64 would make 1.6 GB of the largest."""
    Image.new("I;16", (5000, 5000)).save(tmp_path / "x.png")
    done = run_python("-c", PEAK, tmp_path / "x.png")
    assert done.returncode == 0 and int(done.stdout) * 1024 < 60e6 + 12 * 5000**2, done.stderr
