"""`.npz` files: read in place, written as a stream, never unpickled."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from utils.errors import InputError
from utils.npz import open_npz, row_blocks, write_npz

ARRAYS = {
    "images": np.arange(7 * 4 * 4 * 3, dtype=np.uint8).reshape(7, 4, 4, 3),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "scalar": np.array(3.5),
    "text": np.array('{"a": 1}'),
    "empty": np.zeros((0, 5), np.float32),
}

SMAPS = Path("/proc/self/smaps")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, lambda path, **arrays: write_npz(path, arrays)])
def test_any_npz_reads_back(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    opened = open_npz(tmp_path / "a.npz")
    assert list(opened) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        assert opened[name].shape == expected.shape and opened[name].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(opened[name]), expected)
    images = opened["images"]
    for rows in (slice(2, 5), slice(4, 6), slice(0, 1), slice(5, 99), slice(3, 3)):  # also backwards
        np.testing.assert_array_equal(images[rows], ARRAYS["images"][rows])


def test_numpy_reads_what_is_written_and_equal_arrays_give_equal_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, ARRAYS)
    with np.load(tmp_path / "a.npz") as arrays:
        for name, expected in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], expected)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def resident_mapping(path) -> int:
    """Bytes of a file's mappings that are in this process's memory."""
    total, inside = 0, False
    with SMAPS.open() as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="the kernel's account of mappings is needed")
def test_a_memory_map_is_written_in_little_memory(tmp_path):
    size = 64 << 20
    source = np.lib.format.open_memmap(tmp_path / "source.npy", "w+", np.uint8, (64, size // 64))
    source[:] = np.arange(64, dtype=np.uint8)[:, None]
    assert resident_mapping(tmp_path / "source.npy") > size // 2  # else the account itself is wrong
    tracemalloc.start()
    write_npz(tmp_path / "out.npz", {"arr_0": source})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size * 0.75
    assert resident_mapping(tmp_path / "source.npy") < 1 << 20
    copy = open_npz(tmp_path / "out.npz")["arr_0"]
    assert isinstance(copy, np.memmap) and (copy[:, ::4096] == source[:, ::4096]).all()


def test_row_blocks_cover_the_array_once():
    array = np.arange(50).reshape(25, 2)
    blocks = list(row_blocks(array, block_bytes=3 * array[0].nbytes))
    assert [len(block) for block in blocks] == [3] * 8 + [1]
    np.testing.assert_array_equal(np.concatenate(blocks), array)


class Hostile:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickled_members_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=np.array([Hostile()], dtype=object))
    with pytest.raises(InputError, match=r"a\.npz: member 'arr_0.npy' .*it holds pickled objects"):
        open_npz(tmp_path / "a.npz")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_one_line(tmp_path, compressed):
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, arr_0=np.random.default_rng(0).random((100, 100)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"not an \.npz file, or a truncated one"):
        open_npz(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match=r"not an \.npz file"):
        open_npz(path)
    with pytest.raises(InputError, match="no such file"):
        open_npz(tmp_path / "none.npz")
    if compressed:
        path.write_bytes(whole[:1000] + b"\0" * 500 + whole[1500:])
        with pytest.raises(InputError, match=r"a\.npz: "):
            open_npz(path)["arr_0"][:]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        write_npz(tmp_path / "a.npz", {"good": np.zeros(3), "bad": np.array([{}], dtype=object)})
    assert list(tmp_path.iterdir()) == []
