"""`.npz` and `.npy` files too large for memory: read in place, written as a stream, never unpickled.

An `.npz` is a zip of `.npy` members. `numpy.savez` stores them uncompressed, so that a member can be mapped straight
out of the archive; a compressed member is read as a stream instead. The format of ADM's evaluation suite is one member,
`arr_0`: uint8 (N, H, W, 3).
"""

import math
import mmap
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import InputError
from utils.files import atomic_write

BLOCK_BYTES = 16 << 20
# What zipfile, zlib and numpy, which reads headers as Python's literals, raise on a damaged or made-up file.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's; of others zipfile unpacks a block of any size at once
_WHOLE = 1 << 28  # bytes of a compressed array that are taken into memory at once


class CompressedArray:
    """A compressed member of an `.npz`: contiguous slices of the first axis, decompressed on demand.

    Slices in ascending order cost one pass over the member; going back starts it again.
    """

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, start: int, shape: tuple, dtype: np.dtype):
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._path, self._start = archive.filename, start
        self._row_bytes = dtype.itemsize * math.prod(shape[1:])
        self._stream = archive.open(info)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, stride = rows.indices(len(self))
        assert stride == 1, "a compressed member gives contiguous slices only"
        count = max(last - first, 0)
        _require_whole(self._path, count * self._row_bytes)
        try:
            self._stream.seek(self._start + first * self._row_bytes)
            data = self._stream.read(count * self._row_bytes)
        except _BROKEN as error:
            raise InputError(f"{self._path}: a compressed array cannot be read ({error})") from error
        if len(data) != count * self._row_bytes:
            raise InputError(f"{self._path}: truncated, rows {first} to {last} are missing")
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def open_npz(path: str | Path) -> dict[str, np.ndarray | CompressedArray]:
    """The arrays of an `.npz`, without reading their data.

    Args:
        path: an `.npz` file.
    Returns:
        name -> array. Uncompressed members are read-only memory maps; compressed ones are `CompressedArray`s (both have
        shape, dtype, len() and contiguous slices); compressed scalars and Fortran-ordered ones are plain arrays.
    Raises:
        InputError: the file is missing, no zip, truncated, or holds pickled objects (never loaded: a pickle can run
            any code).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise InputError(f"{path}: not an .npz file, or a truncated one ({error})") from error
    arrays = {info.filename.removesuffix(".npy"): _member(archive, info) for info in archive.infolist()}
    if not arrays:
        raise InputError(f"{path}: an .npz without arrays")
    return arrays


def open_npy(path: str | Path) -> np.ndarray:
    """The array of an `.npy`, as a read-only memory map.

    Raises:
        InputError: no such array, a truncated one, or pickled objects.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would block
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            shape, order, dtype = _read_header(file)
            start = file.tell()
        size = dtype.itemsize * math.prod(shape)
        if path.stat().st_size < start + size:
            raise ValueError(f"{path.stat().st_size - start} bytes are too few for {dtype} {shape}")
        return np.memmap(path, dtype, "r", start, shape, order) if size else np.zeros(shape, dtype)
    except _BROKEN as error:
        raise InputError(f"{path}: damaged or not a .npy array (an interrupted copy?): {error}") from None


def _read_header(stream: BinaryIO) -> tuple[tuple[int, ...], str, np.dtype]:
    """Shape, order ("C" or "F") and type of an `.npy`, whose data follow; what numpy itself may crash on is refused.

    Raises:
        Exception: of many kinds, which `_BROKEN` lists.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded; plain numeric arrays are needed")
    if dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {shape} is no array of numbers")
    return shape, "F" if fortran else "C", dtype


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray | CompressedArray:
    where = f"{archive.filename}: member {info.filename!r}"
    if info.compress_type not in _METHODS:
        raise InputError(f"{where} is packed in a way that numpy does not write; numpy.savez is needed")
    try:
        # Where the data begin, and whether they are all there.
        with archive.open(info) as stream:
            shape, order, dtype = _read_header(stream)
            start = stream.tell()
        size = dtype.itemsize * math.prod(shape)
        if info.file_size != start + size:
            raise ValueError(f"{info.file_size - start} bytes do not fit {dtype} {shape}")

        # None, in place, as a stream, or at once.
        if size == 0:
            return np.zeros(shape, dtype)
        if info.compress_type == zipfile.ZIP_STORED:
            return _mapped(archive, info, start, shape, order, dtype)
        if order == "C" and shape:
            return CompressedArray(archive, info, start, shape, dtype)
        _require_whole(where, size)
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{where} is not a readable .npy array ({error})") from None


def _require_whole(what: str, size: int) -> None:
    """Refuse to unpack so much at once: a small file may hold any number of zeros."""
    if size > _WHOLE:
        problem = f"{what}: {size / 1e9:.3g} GB of a compressed array are needed at once"
        raise InputError(f"{problem}, {_WHOLE / 1e9:.2g} are taken; numpy.savez writes it uncompressed")


def _mapped(archive, info, start, shape, order, dtype) -> np.memmap:
    # The member's data follow its local header: 30 bytes, then a name and an extra field of the lengths given there
    # (the central directory may hold another extra field).
    with Path(archive.filename).open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    offset = info.header_offset + 30 + name + extra + start
    return np.memmap(archive.filename, dtype, "r", offset, shape, order)


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed `.npz` block by block; equal arrays give equal bytes (no time stamp).

    Args:
        path: gets its name when the file is whole.
        arrays: name -> array; memory maps are copied without becoming resident.
    """
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            array = np.asanyarray(array)
            assert not array.dtype.hasobject, f"{name}: object arrays would be pickled"
            array = array if array.ndim and array.flags.c_contiguous else np.array(array, order="C")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(member, header)
                for rows in row_blocks(array):
                    member.write(rows.tobytes())


def row_blocks(array: np.ndarray, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
    """Yield the array in contiguous blocks of rows of about `block_bytes`; a memory map's pages are released."""
    if array.ndim == 0:
        yield array
        return
    step = max(1, block_bytes // max(1, array.nbytes // max(1, len(array))))
    for first in range(0, len(array), step):
        yield array[first : first + step]
        release(array)


def release(array: np.ndarray) -> None:
    """Let go of a memory map's resident pages (the file keeps them): a scan of a large file stays small in memory."""
    # Private maps (mode "c") would lose their changes; shared ones hand dirty pages to the page cache.
    if isinstance(array, np.memmap) and array.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)
