"""The store of finished samples: nothing is lost, nothing is taken for finished that is not, memory stays small."""

import fcntl
import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from sampling.store import SampleStore
from utils.errors import InputError

JOB = {"run": "r", "options": {"num_steps": 5, "seed": 0}}


def make(folder: Path, count: int = 10, batch_size: int = 4, side: int = 3) -> SampleStore:
    return SampleStore(folder / "out" / "r.npz", count=count, resolution=side, batch_size=batch_size)


def start(folder: Path, job: dict = JOB, *, overwrite: bool = False, **shape) -> SampleStore:
    store = make(folder, **shape)
    store.check(job, overwrite=overwrite)
    store.create(job, overwrite=overwrite)
    store.release()
    return store


def batch_of(store: SampleStore, batch: int) -> np.ndarray:
    """A whole batch, also of the last, short one; every sample has its own bytes."""
    shape = (store.batch_size, *store.shape[1:])
    return np.random.default_rng(batch).integers(0, 256, shape, np.uint8)


def expected(store: SampleStore) -> np.ndarray:
    return np.concatenate([batch_of(store, batch) for batch in range(store.num_batches)])[: store.count]


def test_batches_cover_the_samples_once(tmp_path):
    store = make(tmp_path, count=10, batch_size=4)
    assert [i for batch in range(store.num_batches) for i in store.indices(batch)] == list(range(10))
    assert store.indices(2) == range(8, 10) and store.padded_indices(2) == range(8, 12)


def test_written_in_any_order_and_by_several_processes_it_becomes_the_npz(tmp_path):
    first = start(tmp_path)
    second = make(tmp_path)  # another process
    assert first.missing() == [0, 1, 2]
    second.write(2, batch_of(second, 2))
    first.write(0, batch_of(first, 0))
    assert first.missing() == second.missing() == [1]
    assert not first.target.exists()
    second.write(1, batch_of(second, 1))
    assert [first.read(batch).shape[0] for batch in range(3)] == [4, 4, 2]
    first.finish(np.arange(10))
    with np.load(first.target) as arrays:
        assert np.array_equal(arrays["arr_0"], expected(first)) and np.array_equal(arrays["arr_1"], np.arange(10))
    assert [path.name for path in first.target.parent.iterdir()] == ["r.npz"]


def test_an_unfinished_job_gets_no_npz(tmp_path):
    store = start(tmp_path)
    store.write(0, batch_of(store, 0))
    with pytest.raises(AssertionError, match="not every batch"):
        store.finish(np.arange(10))
    assert not store.target.exists()


def test_a_job_killed_beside_its_result_leaves_nothing(tmp_path, monkeypatch):
    """Of this job alone: another one's samples stay."""
    store = start(tmp_path)
    for batch in range(store.num_batches):
        store.write(batch, batch_of(store, batch))
    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "discard", lambda store: None)
        store.finish(np.arange(10))
    lock = store.target.with_name("r.partial.lock")
    for job, left in ((JOB | {"run": "another"}, 4), (JOB, 1), (JOB, 1)):
        lock.touch()
        make(tmp_path).clear_finished(job)
        assert len(list(store.target.parent.iterdir())) == left
    assert store.target.is_file()

    # Killed within the removal, whose first is the description.
    for file in (lock, *store.partial_files[:2]):
        file.touch()
    make(tmp_path).clear_finished(JOB)
    assert [path.name for path in store.target.parent.iterdir()] == [store.target.name]


def test_a_batch_counts_as_finished_only_when_it_is_on_disk(tmp_path, monkeypatch):
    store = start(tmp_path)
    written, pwrite = [], os.pwrite

    def noted(descriptor, data, offset):
        durable = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DSYNC)
        count = pwrite(descriptor, data, offset)
        written.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, durable, store.missing()))
        return count

    monkeypatch.setattr("os.pwrite", noted)
    store.write(1, batch_of(store, 1))
    assert written == [("r.partial.npy", True, [0, 1, 2]), ("r.partial.done", True, [0, 2])]


def test_a_disk_that_takes_a_part_of_a_write_gets_the_rest(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    store = start(tmp_path)
    store.write(1, batch_of(store, 1))
    assert np.array_equal(store.read(1), batch_of(store, 1))


def test_two_jobs_do_not_share_a_name(tmp_path):
    """Also not when the other one began after the check, or ended since."""
    first, second = make(tmp_path), make(tmp_path)
    for store in (first, second):
        store.check(JOB, overwrite=False)
    first.create(JOB)
    with pytest.raises(InputError, match=r"--sample-dir: another job is at work on .*r\.npz"):
        second.create(JOB, overwrite=True)
    for batch in range(3):
        first.write(batch, batch_of(first, batch))
    first.finish(np.arange(10))
    first.release()
    with pytest.raises(InputError, match=r"r\.npz exists already"):
        second.create(JOB)
    second.release()
    assert [path.name for path in first.target.parent.iterdir()] == ["r.npz"]


def test_the_same_job_goes_on(tmp_path):
    store = start(tmp_path)
    store.write(1, batch_of(store, 1))
    (store.target.parent / "r.npz.tmp-77").write_bytes(b"killed while finishing")
    again = start(tmp_path)
    assert again.missing() == [0, 2]
    assert np.array_equal(again.read(1), batch_of(store, 1))
    assert not (store.target.parent / "r.npz.tmp-77").exists()


@pytest.mark.parametrize(
    ("job", "difference"),
    [
        ({"run": "r", "options": {"num_steps": 6, "seed": 0}}, "num_steps: 5, now 6"),
        ({"run": "r", "options": {"num_steps": 5, "seed": 0}, "new": 1}, "new: None, now 1"),
    ],
)
def test_another_job_is_refused_or_on_request_replaces(tmp_path, job, difference):
    store = start(tmp_path)
    store.write(1, batch_of(store, 1))
    with pytest.raises(InputError, match=rf"r.partial.json is of an interrupted job .*\({difference}\); --overwrite"):
        make(tmp_path).check(job, overwrite=False)
    assert make(tmp_path).missing() == [0, 2]  # untouched
    assert start(tmp_path, job, overwrite=True).missing() == [0, 1, 2]


def test_a_job_without_any_finished_batch_is_replaced(tmp_path):
    """Such as one that died of too large a batch."""
    start(tmp_path, batch_size=4)
    assert start(tmp_path, JOB | {"run": "smaller"}, batch_size=2).missing() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage", ["empty images", "no object", "truncated images", "truncated marks", "no images", "no JSON"]
)
def test_damaged_partial_files_are_not_taken_up(tmp_path, damage):
    store = start(tmp_path)
    for batch in range(3):
        store.write(batch, batch_of(store, batch))
    if damage == "truncated images":
        store.images_file.write_bytes(store.images_file.read_bytes()[:-1])
    elif damage == "truncated marks":
        store.done_file.write_bytes(store.done_file.read_bytes()[:-1])
    elif damage == "empty images":
        store.images_file.write_bytes(b"")
    elif damage == "no object":
        store.job_file.write_text("[]")
    elif damage == "no images":
        store.images_file.unlink()
    else:
        store.job_file.write_text('{"run": ')
    with pytest.raises(InputError, match=r"r.partial.json is of an interrupted job .*--overwrite"):
        make(tmp_path).check(JOB, overwrite=False)
    assert start(tmp_path, overwrite=True).missing() == [0, 1, 2]


def test_an_existing_result_stays_until_the_new_one_is_whole(tmp_path):
    store = make(tmp_path)
    store.target.parent.mkdir()
    store.target.write_bytes(b"old")
    with pytest.raises(InputError, match=r"--sample-dir: .*r.npz exists already; --overwrite"):
        store.check(JOB, overwrite=False)
    assert [path.name for path in store.target.parent.iterdir()] == ["r.npz"]
    store = start(tmp_path, overwrite=True)
    for batch in range(3):
        assert store.target.read_bytes() == b"old"
        store.write(batch, batch_of(store, batch))
    store.finish(np.arange(10))
    assert np.array_equal(np.load(store.target)["arr_0"], expected(store))


def test_other_outputs_are_not_written_into_unless_they_are_the_jobs_own(tmp_path):
    folder = tmp_path / "out" / "r"
    folder.mkdir(parents=True)
    store = make(tmp_path)
    with pytest.raises(InputError, match=r"--sample-dir: .*out/r exists already"):
        store.check(JOB, overwrite=False, others=[folder])
    store.create(JOB)
    store.release()
    make(tmp_path).check(JOB, overwrite=False, others=[folder])


def test_too_little_room_on_disk_is_refused(tmp_path, monkeypatch):
    """Twice the images, less what the partial file already takes."""
    usage = namedtuple("usage", "total used free")
    free = [0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free[0]))
    shape = dict(count=4, batch_size=1, side=256)
    size = 4 * 256 * 256 * 3
    for free[0], extra in ((2 * size - 1, 0), (2 * size + 99, 100)):
        with pytest.raises(InputError, match=r"--sample-dir: the samples: .* GB are needed on the disk of"):
            make(tmp_path, **shape).check(JOB, overwrite=False, extra_bytes=extra)
    assert not (tmp_path / "out").exists()
    free[0] = 2 * size
    store = start(tmp_path, **shape)
    for batch in range(3):
        store.write(batch, batch_of(store, batch))
    free[0] = 2 * size - 3 * size // 4
    make(tmp_path, **shape).check(JOB, overwrite=False)
    free[0] = size - 1
    with pytest.raises(InputError, match="are needed"):
        make(tmp_path, **shape).check(JOB, overwrite=False)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"--sample-dir: .*out is no folder that can be written"):
        make(tmp_path).check(JOB, overwrite=False)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    store = start(tmp_path, count=96, batch_size=4, side=600)  # 104 MB
    images = batch_of(store, 0)
    before = resident()
    for batch in range(store.num_batches):
        store.write(batch, images)
    for batch in range(store.num_batches):
        assert store.read(batch).any()
    assert resident() - before < 16e6
    assert json.loads(store.job_file.read_text()) == JOB


def test_an_option_that_nobody_gave_and_one_version_does_not_name_is_no_difference(tmp_path):
    store = start(tmp_path, {"run": "r", "options": {"num_steps": 5, "seed": 0, "vae_ckpt": None}})
    store.write(0, batch_of(store, 0))
    assert start(tmp_path).missing() == [1, 2]
    with pytest.raises(InputError, match=r"cannot go on with \(seed: 0, now 1\)"):
        start(tmp_path, {"run": "r", "options": {"num_steps": 5, "seed": 1, "vae_ckpt": None}})
