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
    assert tree.left_out == {"links back": 2, "broken links": 1}


def test_broken_links_are_classes_among_folders_only(tmp_path):
    touch(tmp_path, "cat/1.png", ".cache")
    for name in ("ant", "zebra"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    assert walk_images(tmp_path).folders == ["ant", "cat", "zebra"]
    (tmp_path / "labels.csv").symlink_to(tmp_path / "gone.csv")
    tree = walk_images(tmp_path)
    assert (tree.folders, tree.left_out) == (["cat"], {"hidden": 1, "broken links": 3})
    (tmp_path / "labels.csv").unlink()
    touch(tmp_path, "labels.csv")
    assert walk_images(tmp_path).folders == ["cat"]


def test_data_folders_are_no_classes_wherever_they_lie(tmp_path):
    touch(tmp_path, "cat/1.png", "dog/1.png", "dog/data/2.png", "cats/run/1.txt", "run/1.txt")
    for name in ("bus", "dog/data", "a/data", "run/data"):
        touch(tmp_path, f"{name}/images.npy", f"{name}/dataset.json")
    (tmp_path / "elk").mkdir()
    tree = walk_images(tmp_path)
    assert tree.files == ["cat/1.png", "dog/1.png"] and tree.folders == ["cat", "cats", "dog", "elk", "run"]
    assert tree.left_out == {"data folders": 4, ".txt": 2}


def test_the_folder_to_write_is_no_class_and_holds_no_image(tmp_path):
    touch(tmp_path, "cat/1.png", "out/images.npy.tmp-1", "dog/1.png")
    assert walk_images(tmp_path, tmp_path / "out").folders == ["cat", "dog"]
    assert walk_images(tmp_path, tmp_path / "new").folders == ["cat", "dog", "out"]
    with pytest.raises(InputError, match=f"^{tmp_path}/cat holds images; another --output-path is needed"):
        walk_images(tmp_path, tmp_path / "cat")


def test_the_record_of_what_is_left_out_stays_small_and_printable(tmp_path):
    touch(tmp_path, "1.png", *(f"{i}.{i}" for i in range(7)), "x.0123456789abcdef", "x.npy", "x.a\nb", "x.7z")
    (tmp_path / os.fsdecode(b"y.\xff")).write_bytes(b"")
    assert walk_images(tmp_path).left_out == {"other": 8, ".npy": 1, "odd suffix": 2, ".7z": 1}
    touch(tmp_path, *(f"x.a{i}" for i in range(200)))
    tree = walk_images(tmp_path)
    assert len(tree.left_out) <= 101 and tree.left_out.total() == 212


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
    (["seg_train/a/1.png", "seg_test/a/1.png"], True, True),
    (["train/a/1.png", "eval/a/1.png"], True, True),
    (["Train/1.png", "Dev/1.png"], True, True),
    (["trainA/1.png", "trainB/1.png", "testA/1.png"], True, True),
    (["train/1.png", "holdout/1.png"], True, True),
    (["trainval/1.png", "test/1.png"], True, True),
    (["X_train_HR/1.png", "X_train_LR/1.png"], True, True),
    (["trainset/1.png", "TestData/1.png"], True, True),
    (["bullet train/1.png", "steam_train/1.png"], False, False),
    (["train/1.png", "bullet_train/1.png"], False, False),
    (["test/1.png", "test_tube/1.png", "dev/1.png"], False, False),
    (["seg_train/a/1.png", "seg_test/a/1.png", "cat/1.png"], False, False),
    (["evaluator/1.png", "trainable/1.png", "testbed/1.png"], False, False),
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


@pytest.mark.parametrize("labelled", [True, False])
def test_parts_in_the_only_folder_are_found(tmp_path, labelled):
    touch(tmp_path, "a/b/train/cat/1.png", "a/b/val/cat/1.png", "notes/n.txt", "a/n.txt")
    said = f"{tmp_path}/a/b holds train, val: parts of a data set, not its classes; give {tmp_path}/a/b/train or"
    with pytest.raises(InputError, match=f"^{said}"):
        refuse_splits(walk_images(tmp_path), labelled=labelled)


def test_classes_below_the_only_folder_are_no_parts(tmp_path):
    touch(tmp_path, "a/b/cat/1.png", "a/b/test/1.png", "a/1.png")
    for labelled in (True, False):
        refuse_splits(walk_images(tmp_path), labelled=labelled)


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
