"""Pickled numbers: read whatever NumPy wrote them; and nothing in a pickle runs."""

import os
import pickle
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest

from utils.errors import InputError
from utils.pickles import read_pickled_numbers

REFERENCE = {
    "num_images": 50000,
    "fid": {"mu": np.linspace(0, 1, 5), "sigma": np.asfortranarray(np.arange(25.0).reshape(5, 5))},
    "fd_dinov2": {"mu": np.arange(3, dtype=np.float32), "sigma": np.eye(3, dtype=">f8")},
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_in_dicts_are_read(tmp_path, protocol):
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(REFERENCE, protocol=protocol))
    found = read_pickled_numbers(tmp_path / "r.pkl")
    assert found["num_images"] == 50000 and list(found) == list(REFERENCE)
    for space in ("fid", "fd_dinov2"):
        for name, array in REFERENCE[space].items():
            assert found[space][name].dtype == array.dtype
            np.testing.assert_array_equal(found[space][name], array)


def test_files_of_older_numpys_are_read(tmp_path):
    data = pickle.dumps({"mu": np.arange(4.0)}, protocol=4)
    assert b"numpy._core.multiarray" in data  # NumPy 2; before: numpy.core.multiarray, a byte shorter
    old = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    frame = old.index(b"\x95") + 1
    length = int.from_bytes(old[frame : frame + 8], "little") - 1
    (tmp_path / "r.pkl").write_bytes(old[:frame] + length.to_bytes(8, "little") + old[frame + 8 :])
    np.testing.assert_array_equal(read_pickled_numbers(tmp_path / "r.pkl")["mu"], np.arange(4.0))


class Planted:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_of_a_pickle_runs(tmp_path):
    planted = tmp_path / "planted"
    for contents in ({"fid": Planted(planted)}, {"fid": np.array([Planted(planted)], dtype=object)}):
        (tmp_path / "r.pkl").write_bytes(pickle.dumps(contents))
        with pytest.raises(InputError, match=r"r\.pkl cannot be read as a pickle of numbers \(it holds an "):
            read_pickled_numbers(tmp_path / "r.pkl")
        assert not planted.exists()
    pickle.loads(pickle.dumps(Planted(planted)))
    assert planted.exists()  # it would have


LOOP: dict = {}
LOOP["fid"] = LOOP


@pytest.mark.parametrize(
    "contents, words",
    [
        (pickle.dumps({"a": OrderedDict()}), "an object of collections.OrderedDict"),
        (pickle.dumps({"a": Fraction(1, 2)}), "an object of fractions.Fraction"),
        (pickle.dumps({"a": np.array(["text"])}), "an array of type 'U4'"),
        (pickle.dumps({"a": np.zeros(2, [("x", "f4")])}), "an array of type 'V4'"),
        (pickle.dumps(LOOP), "it holds one dict twice"),
        (pickle.dumps([1, 2]), "it holds a list"),
        (pickle.dumps(3), "holds a int; a dict is needed"),
        (pickle.dumps(REFERENCE)[:-50], "cannot be read"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 another kind of file", "cannot be read"),
    ],
)
def test_anything_else_is_one_line(tmp_path, contents, words):
    (tmp_path / "r.pkl").write_bytes(contents)
    with pytest.raises(InputError, match=words):
        read_pickled_numbers(tmp_path / "r.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b"abc.",  # BINBYTES8 of 32 TB
        b"\x80\x04Nr" + (0x20000000).to_bytes(4, "little") + b".",  # a memo of half a billion entries
        b"\x80\x04\x95" + (1 << 45).to_bytes(8, "little") + b"}.",  # a frame beyond the end
    ],
)
def test_a_file_that_asks_for_more_memory_than_it_has_bytes_is_refused(tmp_path, data):
    (tmp_path / "r.pkl").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read as a pickle of numbers"):
        read_pickled_numbers(tmp_path / "r.pkl")


def test_dicts_that_are_shared_or_nested_too_deep_are_refused(tmp_path):
    inner = {"mu": 1.0}
    for contents in ({"a": inner, "b": inner}, {"a": {"b": {"c": 1.0}}}):
        (tmp_path / "r.pkl").write_bytes(pickle.dumps(contents))
        with pytest.raises(InputError, match="it holds "):
            read_pickled_numbers(tmp_path / "r.pkl")
