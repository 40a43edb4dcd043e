"""preprocessing.py: trees of every kind of file in, data folders out; what bad input gets."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

import preprocessing
from dataset import preprocess
from dataset.data import ImageData
from tests.golden.fill import synth_image
from tests.support import golden_data

_, GOLDEN = golden_data.load("preprocess")


def save(path, pixels=None, **options):
    """Write pixels, or ones that only this name has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = synth_image(20, 24, zlib.crc32(path.name.encode()) % 997) if pixels is None else pixels
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def run(root, output, *flags, resolution=16, workers=1):
    arguments = ["--imagenet-path", root, "--output-path", output, "--resolution", resolution, "--num-workers", workers]
    preprocessing.main([str(argument) for argument in (*arguments, *flags)])
    return ImageData(output), json.loads((output / "dataset.json").read_text())


@pytest.fixture
def refused(tmp_path, capsys):
    """Call main; check exit code 2, one line on stderr, and that nothing was written; return the line."""

    def call(root, *flags, output=tmp_path / "out"):
        def state():
            return sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file())

        before, existed = state(), output.exists()
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(root, output, *flags)
        assert caught.value.code == 2
        assert (state(), output.exists()) == (before, existed)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in ("b/2.JPG", "b/10.jpeg", "a-b/x.png", "a/deep/er/y.webp", "a/z.png", ".hidden/h.png", "a/.h.png"):
        save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


FILES = ["a/deep/er/y.webp", "a/z.png", "a-b/x.png", "b/10.jpeg", "b/2.JPG"]


def test_crops_have_the_bytes_of_the_public_code(tmp_path):
    for entry in GOLDEN["images"]:
        pixels = synth_image(entry["height"], entry["width"], entry["seed"])
        save(tmp_path / "in" / f"{entry['seed']}.png", pixels)
    data, info = run(tmp_path / "in", tmp_path / "out", resolution=64)
    assert info["class_names"] == [] and not data.labels.any()
    key = "crop64_crc32_pillow_13_0_0" if int(PIL.__version__.split(".")[0]) >= 13 else "crop64_crc32"
    checksums = [zlib.crc32(image.transpose(1, 2, 0).tobytes()) for image in data.images]
    assert checksums == [entry[key] for entry in GOLDEN["images"]]


def test_classes_are_the_top_folders(tree, tmp_path, capsys):
    data, info = run(tree, tmp_path / "out")
    assert info == {
        "format": 1,
        "class_names": ["a", "a-b", "b"],
        "resolution": 16,
        "count": 5,
        "exif_orientation": False,
        "skipped": [],
        "sources": FILES,
        "left_out": {".txt": 1, "hidden": 2},
    }
    assert data.labels.tolist() == [0, 0, 1, 2, 2] and data.labels.dtype == np.int64
    assert data.images.shape == (5, 3, 16, 16) and data.images.dtype == np.uint8 and data.images.flags.c_contiguous
    for image, name in zip(data.images, FILES, strict=True):
        np.testing.assert_array_equal(image, preprocess.read_image(tree / name, 16))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.json", "images.npy", "labels.npy"]
    said = "5 images of 16 x 16, 3 classes, 0 skipped, 2 hidden, 1 .txt left out, "
    assert said in capsys.readouterr().out


def test_max_images_spreads_over_the_classes(tree, tmp_path, capsys):
    data, info = run(tree, tmp_path / "three", "--max-images", 3)
    assert info["sources"] == [FILES[i] for i in (0, 2, 3)] and data.labels.tolist() == [0, 1, 2]
    data, info = run(tree, tmp_path / "four", "--max-images", 4)
    assert info["sources"] == [FILES[i] for i in (0, 1, 2, 3)]
    assert "empty_classes" not in info and "have no image" not in capsys.readouterr().err

    _, info = run(tree, tmp_path / "two", "--max-images", 2)
    assert info["empty_classes"] == {"count": 1, "first": [2]} and len(info["class_names"]) == 3
    printed = capsys.readouterr()
    assert "1 of 3 classes have no image in" in printed.err and printed.err.endswith(": b\n")


def test_a_class_without_a_readable_image_keeps_its_label_and_is_named(tree, tmp_path, capsys):
    for name in ("a-b/x.png", "a-b/y.png"):
        (tree / name).write_bytes(b"")
    data, info = run(tree, tmp_path / "out")
    assert data.labels.tolist() == [0, 0, 2, 2] and info["class_names"] == ["a", "a-b", "b"]
    assert info["empty_classes"] == {"count": 1, "first": [1]}
    assert f"1 of 3 classes have no image in {tmp_path / 'out'}: a-b\n" in capsys.readouterr().err


def test_every_suffix_that_pillow_opens_is_read(tmp_path):
    for i, (suffix, form) in enumerate(
        {"jfif": "JPEG", "jpe": "JPEG", "bmp": "BMP", "TIF": "TIFF", "gif": "GIF", "avif": "AVIF", "ppm": "PPM"}.items()
    ):
        save(tmp_path / "in" / f"{i}" / f"x.{suffix}", format=form)
    data, info = run(tmp_path / "in", tmp_path / "out")
    assert data.labels.tolist() == list(range(7)) and not info["skipped"] and "left_out" not in info


def test_links_are_followed_and_loops_end(tree, tmp_path):
    (tree / "c").symlink_to(tree / "a-b")
    (tree / "a-b" / "back").symlink_to(tree)
    (tree / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    _, info = run(tree, tmp_path / "out")
    assert info["class_names"] == ["a", "a-b", "b", "c"] and info["sources"][-1] == "c/x.png"
    assert info["skipped"] == [{"file": "a/gone.png", "reason": "No such file or directory"}]


def spoil(root):
    """Four unreadable files among good ones; returns their names with a word of the reason."""
    pixels = synth_image(200, 200, 0)
    save(root / "a" / "cut.jpg", pixels)
    whole = (root / "a" / "cut.jpg").read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "page.jpg").write_text("<html>404</html>")
    save(root / "b" / "bomb.png", Image.new("1", (10000, 10000)))
    return {"a/cut.jpg": "truncated", "a/empty.png": "empty", "b/bomb.png": "exceeds limit", "b/page.jpg": "not an"}


def test_unreadable_images_leave_no_holes_whatever_the_number_of_processes(tmp_path, capsys):
    root = tmp_path / "tree"
    for i in range(20):
        save(root / "ab"[i % 2] / f"{i:02}.png")
    bad = spoil(root)
    data, info = run(root, tmp_path / "one", workers=1)
    assert {entry["file"] for entry in info["skipped"]} == set(bad)
    for entry in info["skipped"]:
        assert bad[entry["file"]] in entry["reason"] and str(tmp_path) not in entry["reason"]
    assert (tmp_path / "one" / "images.npy").stat().st_size == data.images.offset + data.images.nbytes
    assert info["count"] == len(data) == 20 and data.labels.tolist() == [0] * 10 + [1] * 10
    for image, name in zip(data.images, info["sources"], strict=True):
        np.testing.assert_array_equal(image, preprocess.read_image(root / name, 16))
    printed = capsys.readouterr()
    assert "20 images" in printed.out and "4 skipped" in printed.out
    assert printed.err.count("\nskipped ") + printed.err.startswith("skipped ") == 4

    run(root, tmp_path / "three", workers=3)  # 24 files in 12 chunks
    for name in preprocess.DATA_FILES:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_on_error_stop_names_the_first_file(tree, refused):
    spoil(tree)
    line = refused(tree, "--on-error", "stop")
    assert "--on-error stop: " in line and "a/cut.jpg: image file is truncated" in line


def test_a_tree_without_a_readable_image_is_refused(tmp_path, refused):
    for name in "xy":
        save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.png").write_bytes(b"")
    assert "none of 2 images is readable (first: x.png: empty file)" in refused(tmp_path / "in")


def test_files_of_every_mode_show_the_same_picture(tmp_path):
    """One picture in many files: all give about the same pixels, lossless ones the same."""
    root, colours = tmp_path / "in", np.repeat(np.repeat(synth_image(4, 4, 5), 8, axis=0), 8, axis=1)
    rgb, grey = Image.fromarray(colours), Image.fromarray(colours).convert("L")
    alpha = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8), (32, 1)))
    save(root / "rgb" / "png.png", rgb)
    save(root / "rgb" / "rgba.png", Image.merge("RGBA", [*rgb.split(), alpha]))
    save(root / "rgb" / "palette.png", rgb.quantize(16), transparency=bytes(range(16)))
    save(root / "rgb" / "lossless.webp", rgb, lossless=True)
    save(root / "rgb" / "really_png.JPEG", rgb, format="PNG")
    save(root / "rgb~" / "jpeg.jpg", rgb, quality=95, subsampling=0)
    save(root / "rgb~" / "cmyk.jpg", rgb.convert("CMYK"), quality=95)
    save(root / "grey" / "l.png", grey)
    save(root / "grey" / "la.png", Image.merge("LA", [grey, alpha]))
    save(root / "grey" / "16.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
    save(root / "grey~" / "l.jpg", grey, quality=95)
    data, info = run(root, tmp_path / "out", resolution=32)
    assert len(data) == 11 and not info["skipped"]
    wanted = {"rgb": colours, "grey": np.repeat(np.asarray(grey)[..., None], 3, axis=2)}
    for image, source in zip(data.images, info["sources"], strict=True):
        kind = source.split("/")[0]
        difference = np.abs(image.transpose(1, 2, 0).astype(int) - wanted[kind.strip("~")])
        assert difference.max() <= (12 if kind.endswith("~") else 0), source


def test_exif_orientation_only_when_asked_for(tmp_path, capsys):
    pixels = synth_image(16, 16, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    save(tmp_path / "in" / "0.png", pixels, exif=exif)
    exif[0x0112] = 1
    save(tmp_path / "in" / "1.jpg", pixels, exif=exif)
    save(tmp_path / "in" / "2.jpg", pixels, exif=b"Exif\x00\x00II*\x00damaged")
    plain, info = run(tmp_path / "in", tmp_path / "plain")
    np.testing.assert_array_equal(plain.images[0].transpose(1, 2, 0), pixels)
    turned, turned_info = run(tmp_path / "in", tmp_path / "turned", "--exif-orientation")
    np.testing.assert_array_equal(turned.images[0].transpose(1, 2, 0), np.rot90(pixels, -1))
    assert (info["exif_orientation"], turned_info["exif_orientation"]) == (False, True)
    assert (info["exif_turns"], turned_info["exif_turns"]) == (1, 1)
    said = "1 images ask by EXIF to be turned: they stay as they lie (--exif-orientation turns them)"
    assert capsys.readouterr().err.count(said) == 1  # of the first run
    assert plain.fingerprint != turned.fingerprint


# --- labels from dataset.json


def write_labels(root, labels):
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_stylegan_labels_override_the_folders(tree, tmp_path):
    write_labels(tree, [[name, 7 - i] for i, name in enumerate(FILES)][::-1])
    data, info = run(tree, tmp_path / "out")
    assert data.labels.tolist() == [7, 6, 5, 4, 3] and info["class_names"] == []
    write_labels(tree, None)
    assert not run(tree, tmp_path / "unlabelled")[0].labels.any()


def test_labels_that_do_not_start_at_0_are_said_and_recorded(tree, tmp_path, caplog):
    write_labels(tree, [[name, 1 + 2 * (i % 2)] for i, name in enumerate(FILES)])
    data, info = run(tree, tmp_path / "out")
    assert data.labels.tolist() == [1, 3, 1, 3, 1] and info["empty_classes"] == {"count": 2, "first": [0, 2]}
    assert "dataset.json: labels run from 1 to 3, and no image has 0, 2 (empty classes: 2)" in caplog.text


def test_the_last_labels_of_a_file_are_classes_also_without_an_image(tree, tmp_path, capsys):
    write_labels(tree, [[name, i] for i, name in enumerate(FILES)])
    data, info = run(tree, tmp_path / "whole")
    assert data.num_classes == 5 and "num_classes" not in info  # the labels show it
    data, info = run(tree, tmp_path / "part", "--max-images", 3)
    assert data.num_classes == info["num_classes"] == 5 and info["empty_classes"] == {"count": 2, "first": [3, 4]}
    printed = capsys.readouterr()
    assert "3 images of 16 x 16, 5 classes, " in printed.out and "2 of 5 classes have no image in" in printed.err
    for name in FILES[3:]:
        (tree / name).write_bytes(b"")
    data, info = run(tree, tmp_path / "damaged")
    assert data.num_classes == info["num_classes"] == 5 and data.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", ['{"author": "me"}', "[]"])
def test_a_dataset_json_of_another_kind_is_ignored_aloud(tree, tmp_path, caplog, content):
    (tree / "dataset.json").write_text(content)
    assert run(tree, tmp_path / "out")[1]["class_names"] == ["a", "a-b", "b"]
    assert "has no 'labels'" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"labels": [["a/z.png", 0]]}', "4 of 5 images have no label (first: a/deep/er/y.webp)"),
        (json.dumps({"labels": [[n, 0] for n in [*FILES, "q.png", "p.png"]]}), "labels 2 files that are no images"),
        ('{"labels": [["a/z.png", 0.5]]}', 'is needed, not ["a/z.png", 0.5]'),
        ('{"labels": [["a/z.png", -1]]}', "whole numbers >= 0 is needed"),
        ('{"labels": [["a/z.png", true]]}', "whole numbers >= 0 is needed"),
        ('{"labels": [["a/z.png", 9223372036854775808]]}', "whole numbers >= 0 is needed"),
        ('{"labels": {"a/z.png": 0}}', '{"labels": [[path, index], ...]}'),
        ('{"labels": [["a/z.png", 1], ["a/./z.png", 2]]}', "a/z.png has two labels, 1 and 2"),
        ('{"labels": ', "cannot be read as JSON"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tree, refused, content, words):
    (tree / "dataset.json").write_text(content)
    assert words in refused(tree)


# --- what bad input gets


def test_folders_that_cannot_be_meant_are_refused(tmp_path, tree, refused):
    assert f"--imagenet-path: {tmp_path / 'no'} is not a folder" in refused(tmp_path / "no")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.heic").write_bytes(b"heic")
    line = refused(tmp_path / "bare")
    assert f"--imagenet-path: no image below {tmp_path / 'bare'} (found: 1 .heic); files named .apng .avif" in line
    assert "is the folder of the images" in refused(tree, output=tree)
    assert "is a file; a folder is needed" in refused(tree, output=tree / "notes.txt")
    save(tree / "loose.png")
    assert "1 images lie beside the class folders" in refused(tree)


def test_a_disk_that_is_too_small_is_refused(tree, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("utils.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    line = refused(tree, output=tmp_path / "new" / "out")
    assert "--output-path: 5 images of 16 x 16: " in line and "GB are free" in line


def test_an_existing_data_folder_stays_unless_overwritten(tree, tmp_path, refused, capsys):
    output = tmp_path / "out"
    old, _ = run(tree, output)
    latents = {"name": "vae", "dataset_fingerprint": old.fingerprint}
    (output / "vae.json").write_text(json.dumps(latents))
    (output / "vae.npy").write_bytes(b"latents")
    assert "holds images.npy, labels.npy, dataset.json already" in refused(tree)

    run(tree, output, "--overwrite")  # the same images: the cache still belongs to them
    assert "latents 'vae'" not in capsys.readouterr().out
    save(tree / "c" / "new.png")
    data, _ = run(tree, output, "--overwrite")
    assert "latents 'vae'" in capsys.readouterr().out
    assert len(data) == 6 and (output / "vae.npy").read_bytes() == b"latents"


def test_a_data_folder_among_the_classes_is_none_of_them(tree, tmp_path, refused):
    before, info = run(tree, tree / "aa" / "data")
    after, again = run(tree, tree / "aa" / "data", "--overwrite")
    assert after.labels.tolist() == before.labels.tolist() and after.fingerprint == before.fingerprint
    assert again["class_names"] == info["class_names"] == ["a", "a-b", "b"]
    assert again["left_out"] == {**info["left_out"], "data folders": 1}
    assert "a-b holds images; another --output-path is needed" in refused(tree, output=tree / "a-b")


def test_a_public_data_folder_gets_the_files_beside_its_own(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images.h5").write_bytes(b"public")
    assert len(run(tree, tmp_path / "out")[0]) == 5
    assert (tmp_path / "out" / "images.h5").read_bytes() == b"public"


def test_names_of_any_bytes_are_printed_and_written(tree, tmp_path):
    for name in (b"a/x.\xff", b"a/\xff.png", b"a/n\nn.png"):
        (tree / os.fsdecode(name)).write_bytes(b"")
    output = tmp_path / os.fsdecode(b"out\xff\xc3\xb6")
    command = [sys.executable, "preprocessing.py", "--imagenet-path", tree, "--output-path", output]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [*command, "--num-workers", "1", "--resolution", "16"], capture_output=True, text=True, env=environment
    )
    skipped = ["skipped a/n\\nn.png: empty file", "skipped a/\\udcff.png: empty file"]
    assert done.returncode == 0 and done.stderr.splitlines() == skipped
    assert ", 1 odd suffix, " in done.stdout and done.stdout.endswith("out\\udcff\\xf6\n")
    assert json.loads((output / "dataset.json").read_text())["left_out"] == {".txt": 1, "hidden": 2, "odd suffix": 1}


def test_the_command_prints_one_line(tree, tmp_path):
    command = [sys.executable, "preprocessing.py", "--imagenet-path", str(tree), "--output-path", str(tmp_path / "out")]
    done = subprocess.run([*command, "--num-workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("5 images of 256 x 256, 3 classes, 0 skipped, ") and done.stdout.count("\n") == 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("preprocessing.py: error: --output-path: ")
    assert done.stderr.count("\n") == 1
