"""Data folders and cached latents: what they hold, and what is refused."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from dataset.data import ImageData, LatentData, LatentsAndLabels, evenly_spaced
from tests.support.refusals import refusal
from utils import files
from utils.errors import InputError

COUNT, RESOLUTION = 23, 8


def write_data(folder, *, images=None, labels=None, **info):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 3, RESOLUTION, RESOLUTION), np.uint8) if images is None else images
    labels = np.arange(len(images)) % 5 if labels is None else labels
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    info = {"resolution": RESOLUTION, "count": len(images), "sources": [f"{i}.png" for i in range(len(images))], **info}
    files.write_json(folder / "dataset.json", info)
    return folder


STATISTICS = {"latents_scale": [1.0] * 4, "latents_bias": [0.0] * 4}


def write_latents(path, fingerprint, *, count=COUNT, dtype=np.float32, **info):
    array = np.random.default_rng(1).standard_normal((count, 8, 2, 2)).astype(dtype)
    np.save(f"{path}.npy", array)
    files.write_json(f"{path}.json", {"dataset_fingerprint": fingerprint, "count": count, **STATISTICS, **info})
    return array


@pytest.fixture
def data(tmp_path):
    return ImageData(write_data(tmp_path / "data"))


# --- data folder


def test_items_come_in_the_order_asked_for(data):
    images, labels = data.__getitems__([5, 0, 22, 5])
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images, np.load(data.folder / "images.npy")[[5, 0, 22, 5]])
    assert labels.tolist() == [0, 0, 2, 0]
    assert (len(data), data.resolution) == (COUNT, RESOLUTION)


def test_the_number_of_classes_is_the_largest_that_anything_says(tmp_path):
    for i, (info, number) in enumerate(
        [
            ({}, 5),
            ({"num_classes": 9, "class_names": []}, 9),
            ({"class_names": list("abcdefg")}, 7),
            ({"num_classes": 2}, 5),
        ]
    ):
        assert ImageData(write_data(tmp_path / str(i), **info)).num_classes == number


def test_a_pickled_data_set_carries_a_path_instead_of_pixels(data):
    pickled = pickle.dumps(data)
    assert len(pickled) < 500
    assert torch.equal(pickle.loads(pickled).__getitems__([3])[0], data.__getitems__([3])[0])


def test_fingerprint_identifies_the_data_set(data, tmp_path):
    shutil.copytree(data.folder, tmp_path / "copy")
    assert ImageData(tmp_path / "copy").fingerprint == data.fingerprint
    changed = data.images.copy()
    changed[11, 1] += 1
    others = [
        write_data(tmp_path / "pixels", images=changed),
        write_data(tmp_path / "labels", labels=np.zeros(COUNT, np.int64)),
        write_data(tmp_path / "sources", sources=[f"{i}.jpg" for i in range(COUNT)]),
        write_data(tmp_path / "turned", exif_orientation=True),
        write_data(tmp_path / "fewer", images=data.images[:-1]),
    ]
    prints = {data.fingerprint, *(ImageData(other).fingerprint for other in others)}
    assert len(prints) == len(others) + 1


def test_missing_data_folder_names_the_command(tmp_path):
    message = refusal(ImageData, tmp_path / "none", resolution=512)
    assert message.startswith(f"--data-dir: {tmp_path / 'none'} is not a folder")
    assert f"python preprocessing.py --imagenet-path /PATH/TO/IMAGES --output-path {tmp_path / 'none'}" in message
    assert message.endswith("--resolution 512")


def test_public_h5_folder_asks_for_preprocessing(tmp_path):
    (tmp_path / "images.h5").write_bytes(b"\x89HDF")
    (tmp_path / "vae-sd").mkdir()
    message = refusal(ImageData, tmp_path)
    assert "images.h5 of the public release" in message and "preprocessing.py again" in message


def test_another_resolution_and_too_few_classes_are_refused(data):
    message = refusal(ImageData, data.folder, resolution=256)
    assert message.startswith("--resolution: 256 was given; ") and "8 x 8" in message
    message = refusal(ImageData, data.folder, num_classes=4)
    assert message.startswith("--num-classes: 4 was given; ") and "is 4: at least 5 is needed" in message
    assert len(ImageData(data.folder, resolution=8, num_classes=5)) == COUNT


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "labels.npy").unlink(), "lacks labels.npy"),
        (lambda d: (d / "images.npy").write_bytes((d / "images.npy").read_bytes()[:-1]), "images.npy: damaged"),
        (lambda d: (d / "images.npy").write_bytes(b""), "images.npy: damaged"),
        (lambda d: (d / "labels.npy").write_bytes(b"\x80\x04N."), "labels.npy: damaged"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: cannot be read as JSON"),
        (lambda d: (d / "dataset.json").write_text("[]"), "dataset.json: a JSON object"),
        (lambda d: np.save(d / "images.npy", np.zeros((COUNT, 3, 8, 8), np.float32)), "float32 .* uint8 .* needed"),
        (lambda d: np.save(d / "images.npy", np.zeros((COUNT, 8, 8, 3), np.uint8)), "shape .* is needed"),
        (lambda d: np.save(d / "labels.npy", np.zeros(COUNT - 1, np.int64)), "do not belong together.*22"),
        (lambda d: np.save(d / "labels.npy", np.full(COUNT, -1)), "label -1"),
        (lambda d: write_data(d, count=99), "do not belong together.*99"),
        (lambda d: write_data(d, resolution=16), "do not belong together.*16"),
        (lambda d: write_data(d, images=np.zeros((0, 3, 8, 8), np.uint8)), "images.npy"),
    ],
)
def test_a_damaged_data_folder_is_refused(tmp_path, damage, words):
    folder = write_data(tmp_path / "data")
    damage(folder)
    with pytest.raises(InputError, match=words):
        ImageData(folder)


# --- latents


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_come_beside_the_labels_and_images_of_the_same_items(data, dtype):
    array = write_latents(data.folder / "vae.v1", data.fingerprint, dtype=dtype)
    latents = LatentData(data.folder / "vae.v1", data)
    mean_std = latents.__getitems__([7, 2])
    assert mean_std.dtype == torch.float32 and len(latents) == COUNT
    np.testing.assert_array_equal(mean_std, array[[7, 2]].astype(np.float32))

    images, labels = data.__getitems__([7, 2])
    both = LatentsAndLabels(latents, data, with_images=True).__getitems__([7, 2])
    assert all(torch.equal(a, b) for a, b in zip(both, (mean_std, images, labels), strict=True))
    without = LatentsAndLabels(latents, data, with_images=False).__getitems__([7, 2])
    assert all(torch.equal(a, b) for a, b in zip(without, (mean_std, labels), strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(latents)).__getitems__([1]), latents.__getitems__([1]))


def test_latents_that_do_not_belong_to_the_data_set_are_refused(data, tmp_path):
    path = tmp_path / "vae"
    message = refusal(LatentData, path, data)
    assert message.startswith("--vae-latents-name: ") and "cache_latents.py --vae-latents-name vae" in message
    write_latents(path, "another")
    assert "another data set" in refusal(LatentData, path, data)
    assert len(LatentData(path)) == COUNT
    write_latents(path, data.fingerprint, count=COUNT - 1)
    assert "another data set (22 images)" in refusal(LatentData, path, data)
    write_latents(path, data.fingerprint, count=COUNT)
    files.write_json(f"{path}.json", {"dataset_fingerprint": data.fingerprint, "count": COUNT + 1})
    assert "23 latents, but vae.json counts 24" in refusal(LatentData, path, data)
    np.save(f"{path}.npy", np.zeros((COUNT, 7, 2, 2), np.float32))
    files.write_json(f"{path}.json", {"dataset_fingerprint": data.fingerprint, "count": COUNT})
    assert "(23, 7, 2, 2); (N, 2C, h, w)" in refusal(LatentData, path, data)
    np.save(f"{path}.npy", np.zeros((COUNT, 8, 2, 2), np.float64))
    assert "float64 (23, 8, 2, 2); float32 or float16 (N, 2C, h, w) is needed" in refusal(LatentData, path, data)


def test_evenly_spaced_indices_are_at_most_all():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 10) == [0, 1, 2]
