"""Which files of a folder are images, for every script; and that long texts in them do no harm."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dataset.image_files import FORMATS, image_suffixes, open_image, refuse_splits, walk_images
from tests.support.small import ROOT
from utils.errors import InputError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_suffixes_are_those_that_pillow_opens_in_safe_formats():
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".mpo"} <= {
        *image_suffixes()
    }
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".hdf", ".psd", ".mpg"} & {*image_suffixes()}
    assert set(FORMATS) <= set(Image.OPEN)  # Pillow has a reader of each


def test_what_is_left_out_is_counted(tmp_path):
    touch(
        tmp_path, "b/2.JPG", "b/x/1.jfif", "b.png", "a/1.heic", "a/2.heic", "a/LICENSE", "n.txt", ".h/1.png", "b/.2.png"
    )
    touch(tmp_path, "@eaDir/thumb.jpg", "b/@eaDir/thumb.jpg", "__MACOSX/b/1.png", "lost+found/1.png", "b/@me.png")
    (tmp_path / "c").mkdir()
    tree = walk_images(tmp_path)
    assert tree.files == ["b/2.JPG", "b/@me.png", "b/x/1.jfif", "b.png"]
    assert tree.folders == ["a", "b", "c"]
    assert tree.left_out == {".heic": 2, "no suffix": 1, ".txt": 1, "hidden": 6}
    assert tree.left_out_text() == "6 hidden, 2 .heic, 1 no suffix, 1 .txt"


def test_links_are_followed_and_circles_cut(tmp_path):
    touch(tmp_path, "elsewhere/1.png", "elsewhere/deep/2.png", "tree/a/1.png", "tree/a/3.png")
    root = tmp_path / "tree"
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "top").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "gone")
    (root / "a" / "2.png").symlink_to(tmp_path / "elsewhere/1.png")
    tree = walk_images(root)
    assert tree.files == ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/deep/2.png"]
    assert tree.folders == ["a", "b", "c"]  # c: a class whose link leads nowhere
    assert tree.left_out == {"links back": 2, "no suffix": 1}


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    touch(tmp_path, "1.heic", "2.heic", "n.txt")
    with pytest.raises(InputError, match=r"no image below .*\(found: 2 .heic, 1 .txt\); files named .apng"):
        walk_images(tmp_path)


SPLITS = [  # files, refused as classes, refused as one set
    (["train/a/1.png", "val/a/1.png"], True, True),
    (["train/1.png", "val/1.png"], True, True),
    (["train2017/1.png", "val2017/1.png", "annotations/x.json"], True, True),
    (["Train/a/1.png", "Test/a/1.png", "code/x.py"], True, True),
    (["train/a/1.png", "train/b/1.png"], True, False),
    (["train/1.png", "val/n.txt"], True, False),
    (["images/1.png", "labels/1.txt"], True, False),
    (["images/1.png", "masks/1.png"], True, True),
    (["images/a/1.png"], True, False),
    (["train/1.png"], False, False),  # all of one class, whatever its name
    (["images/1.png"], False, False),
    (["test/1.png", "trial/1.png"], False, False),  # a class called test
    (["train/1.png", "car/1.png", "bus/1.png"], False, False),
    (["label/1.png", "mask/1.png"], False, False),
    (["trainer/a/1.png", "valley/1.png"], False, False),
]


@pytest.mark.parametrize("names, as_classes, as_one_set", SPLITS)
def test_parts_of_a_data_set_are_no_classes(tmp_path, names, as_classes, as_one_set):
    touch(tmp_path, *names)
    tree = walk_images(tmp_path)
    for labelled, is_refused in ((True, as_classes), (False, as_one_set)):
        if not is_refused:
            refuse_splits(tree, labelled=labelled)
            continue
        instead = tmp_path / names[0].split("/")[0]
        with pytest.raises(InputError, match=f"parts of a data set, not its classes; give {instead}"):
            refuse_splits(tree, labelled=labelled)


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_a_png_with_long_text_or_profile_is_read(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat " * (3 << 18), zip=True)  # 4.5 MB
    options = {"pnginfo": text} if kind == "text" else {"icc_profile": bytes(4 << 20)}
    Image.fromarray(pixels).save(tmp_path / "x.png", **options)
    with open_image(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_text_that_would_fill_the_memory_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add(b"zTXt", b"k\0\0" + zlib.compress(bytes(65 << 20)))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(ValueError, match="too large"), open_image(tmp_path / "x.png") as image:
        image.load()


def test_no_other_program_is_started_for_an_image(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(Image.UnidentifiedImageError), open_image(tmp_path / "x.png"):
        pass


def test_preparing_images_needs_no_torch():
    code = "import sys, preprocessing; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 0
