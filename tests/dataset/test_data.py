"""Data folders, cached latents, the order of batches; files that appear whole or not at all."""

import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from dataset.data import ImageData, LatentData, LatentsAndLabels
from dataset.order import batches, batches_per_epoch
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


def write_latents(path, fingerprint, *, count=COUNT, dtype=np.float32, **info):
    array = np.random.default_rng(1).standard_normal((count, 8, 2, 2)).astype(dtype)
    np.save(f"{path}.npy", array)
    files.write_json(f"{path}.json", {"dataset_fingerprint": fingerprint, "count": count, **info})
    return array


@pytest.fixture
def data(tmp_path):
    return ImageData(write_data(tmp_path / "data"))


class Indices:
    """A data set whose items are their own indices."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        return list(indices)


def take(count, iterator):
    return list(itertools.islice(iterator, count))


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


# --- data folder


def test_items_come_in_the_order_asked_for(data):
    images, labels = data.__getitems__([5, 0, 22, 5])
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    np.testing.assert_array_equal(images, np.load(data.folder / "images.npy")[[5, 0, 22, 5]])
    assert labels.tolist() == [0, 0, 2, 0]
    assert (len(data), data.resolution) == (COUNT, RESOLUTION)


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


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_wrong_resolution_and_labels(data):
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
def test_damaged_data_folders(tmp_path, damage, words):
    folder = write_data(tmp_path / "data")
    damage(folder)
    with pytest.raises(InputError, match=words):
        ImageData(folder)


# --- latents


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_and_their_combinations(data, dtype):
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


def test_refused_latents(data, tmp_path):
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


# --- batches


def test_processes_share_the_same_global_batches():
    def global_batches(world_size):
        ranks = [
            batches(Indices(50), batch_size=8, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        return [flat(parts) for parts in take(20, zip(*ranks, strict=True))]

    assert global_batches(1) == global_batches(2) == global_batches(4)


def test_every_epoch_is_another_permutation():
    assert batches_per_epoch(51, 10) == 5
    order = take(15, batches(Indices(51), batch_size=10, seed=0))
    epochs = [flat(order[i : i + 5]) for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 50 and set(epoch) <= set(range(51))
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(1, batches(Indices(51), batch_size=10, seed=1)) != order[:1]
    assert sorted(flat(take(5, batches(Indices(50), batch_size=10, seed=0)))) == list(range(50))


def test_the_order_stays_what_it_was():
    """Resumed runs of later versions must see the same order."""
    assert take(2, batches(Indices(10), batch_size=5, seed=0)) == [[8, 0, 3, 7, 6], [4, 1, 5, 2, 9]]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_start_equals_skipping(start):
    whole = take(start + 7, batches(Indices(23), batch_size=4, seed=0))
    assert take(7, batches(Indices(23), batch_size=4, seed=0, start=start)) == whole[start:]


def test_a_far_start_costs_nothing():
    assert len(take(1, batches(Indices(23), batch_size=4, seed=0, start=10**15))[0]) == 4


def test_workers_change_nothing_and_the_training_generator_stays(data):
    before = torch.get_rng_state()
    serial, parallel = (
        take(8, batches(data, batch_size=6, seed=0, rank=1, world_size=2, start=2, num_workers=n)) for n in (0, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(serial, parallel, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert serial[0][0].shape == (3, 3, RESOLUTION, RESOLUTION)


def test_batch_size_errors_come_at_once():
    message = refusal(batches, Indices(7), batch_size=8, seed=0)
    assert message.startswith("--batch-size: 8 was given; ") and "7 images" in message
    message = refusal(batches, Indices(50), batch_size=10, seed=0, rank=0, world_size=4)
    assert message.startswith("--batch-size: 10 was given; a multiple of 4")


# --- files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "sub" / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        assert json.loads(path.read_text()) == {"old": 1}
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_require_disk_looks_at_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    usage = shutil._ntuple_diskusage(10**12, 0, 5 * 10**9)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    files.require_disk(tmp_path / "a" / "b", 5 * 10**9, "--output-dir: it")
    assert asked == [tmp_path]
    message = refusal(files.require_disk, tmp_path / "a" / "b", 251_661_000_000, "--output-dir: it")
    assert message == f"--output-dir: it: 252 GB are needed on the disk of {tmp_path / 'a' / 'b'}, 5 GB are free"
