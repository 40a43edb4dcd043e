"""Broken files of any kind: the right value, or one line; and nothing runs, and little memory is taken."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hostile import JSON, NAMES, broken, broken_json, npy, outcome
from tests.support.refusals import refusal
from utils.files import read_json, read_object
from utils.inert import read_inert
from utils.npz import CompressedArray, open_npy, open_npz
from utils.pickles import read_pickled_numbers
from utils.torch_files import read_torch_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


# JSON


@given(JSON)
def test_json_that_is_written_reads_back(folder, value):
    (folder / "x.json").write_text(json.dumps(value))
    found = read_json(folder / "x.json")
    assert repr(found) == repr(value)  # NaN too


@given(broken_json({"count": 3, "names": ["a", "b"], "inner": {"x": 1.5}}))
def test_json_that_is_broken_is_one_line_or_an_object(folder, data):
    (folder / "x.json").write_bytes(data)
    found = outcome(read_object, folder / "x.json", count=int, names=list)
    assert found is None or type(found.get("count", 0)) in (int, type(None))


# Arrays


@given(npy())
def test_arrays_with_a_made_up_header_are_one_line_or_mapped(folder, data):
    (folder / "x.npy").write_bytes(data)
    array = outcome(open_npy, folder / "x.npy")
    assert array is None or array.nbytes <= len(data)


@given(npy(), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]), NAMES)
def test_archives_of_made_up_arrays_are_one_line_or_have_those_numbers(folder, data, method, name):
    with zipfile.ZipFile(folder / "x.npz", "w", method) as archive:
        archive.writestr("x" + name.encode(errors="replace").decode() + ".npy", data)
    read_all(outcome(open_npz, folder / "x.npz"))


def read_all(arrays):
    for array in (arrays or {}).values():
        size = array.dtype.itemsize
        assert array.size * size <= 1000 if isinstance(array, np.ndarray) else len(array) * array._row_bytes <= 1000
        if isinstance(array, CompressedArray):
            outcome(array.__array__)
            outcome(array.__getitem__, slice(0, 2))


WHOLE = io.BytesIO()
np.savez_compressed(WHOLE, images=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), text=np.array("{}"))
STORED = io.BytesIO()
np.savez(STORED, images=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), text=np.array("{}"))


@given(broken(WHOLE.getvalue()) | broken(STORED.getvalue()))
def test_broken_archives_are_one_line(folder, data):
    (folder / "y.npz").write_bytes(data)
    for array in (outcome(open_npz, folder / "y.npz") or {}).values():
        outcome(np.asarray, array)


# Pickles


PICKLED = pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}, "n": 3})
SAVED = io.BytesIO()
torch.save({"model": {"w": torch.ones(3)}, "args": {"a": 1}, "steps": 3}, SAVED)
OLD = io.BytesIO()
torch.save({"model": {"w": torch.ones(3)}, "args": {"a": 1}}, OLD, _use_new_zipfile_serialization=False)


@given(broken(PICKLED))
def test_broken_pickles_of_numbers_are_one_line(folder, data):
    (folder / "x.pkl").write_bytes(data)
    outcome(read_pickled_numbers, folder / "x.pkl")


@given(broken(SAVED.getvalue()) | broken(OLD.getvalue()))
def test_broken_checkpoints_are_one_line(folder, data):
    (folder / "x.pt").write_bytes(data)
    for read in (read_torch_file, read_inert):
        outcome(read, folder / "x.pt")


def pickle_of(saved: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return archive.read("archive/data.pkl")


@given(broken(pickle_of(SAVED.getvalue())))
def test_whole_archives_of_a_broken_pickle_are_one_line(folder, data):
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        for name, content in (("data.pkl", data), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", bytes(12))):
            archive.writestr(f"archive/{name}", content)
    for read in (read_torch_file, read_inert):
        outcome(read, folder / "x.pt")


@pytest.mark.parametrize("old", [False, True])
def test_a_buffer_of_any_length_is_not_made(folder, old):
    """torch's reader of plain values would take bytearray(2**40) for one."""
    torch.save({"w": torch.ones(2), "x": bytearray(3)}, folder / "x.pt", _use_new_zipfile_serialization=not old)
    assert "an object of builtins.bytearray" in refusal(read_torch_file, folder / "x.pt")
