"""Pickles of plain values and numeric arrays (EDM2's references), read without running anything that is in them."""

import io
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np

from utils.errors import InputError

_DEPTH = 2  # of dicts in dicts: {metric: {"mu": ..., "sigma": ...}}
_LARGEST = 2**30  # bytes of a file; EDM2's have some 50 MB
# What the C and Python unpicklers raise on a damaged or made-up file.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_pickled_numbers(path: str | Path) -> dict:
    """The dict of a pickle that holds numbers, texts, dicts of them, and arrays of numbers.

    No class of the file is looked up. The four names by which NumPy pickles an array get stand-ins of our own, which
    take in its bytes, shape and type, and nothing else.

    Raises:
        InputError: missing, damaged, no dict, or one that holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        if path.stat().st_size > _LARGEST:
            raise pickle.UnpicklingError(f"it has more than {_LARGEST >> 20} MB")
        data = path.read_bytes()
        require_modest(data)
        contents = _plain(_Reader(io.BytesIO(data)).load(), _DEPTH, set())
    except _BROKEN as error:
        problem = f"{path} cannot be read as a pickle of numbers ({str(error) or type(error).__name__})"
        raise InputError(f"{problem}; nothing else is unpickled") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}; a dict is needed")
    return contents


def require_modest(data: bytes) -> None:
    """Refuse a pickle that asks for more memory than it has bytes; looking at its opcodes runs nothing.

    Raises:
        ValueError: a length beyond the end of the file.
        InputError: a memo that is larger than the file.
    """
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise InputError(f"it remembers {argument} values in {len(data)} bytes")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        # Every look-up gives a new function: a pickle can change what it is given, and these are thrown away.
        match module.replace("numpy.core", "numpy._core"), name:
            case "numpy._core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy._core.numeric", "_frombuffer":
                return lambda data, kind, shape, order: _Array().fill(data, kind, shape, order == "F")
            case "numpy", "dtype":
                return lambda text, *_: _Kind(text)
            case "numpy", "ndarray":
                return "ndarray"
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}")


class _Kind:
    """Stands in for a dtype: a number of so many bytes."""

    def __init__(self, text: str):
        if not re.fullmatch(r"[fiu][1248]", text):
            raise pickle.UnpicklingError(f"it holds an array of type {text!r}")
        self.text, self.byte_order = text, "="

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = {"<": "<", ">": ">"}.get(state[1], "=")


class _Array:
    """Stands in for an array, until `_plain` takes it out."""

    values: np.ndarray | None = None

    def fill(self, data, kind: _Kind, shape: tuple, is_fortran: bool) -> "_Array":
        dtype = np.dtype(kind.byte_order + kind.text)
        self.values = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
        return self

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, data = state
        self.fill(data, kind, shape, is_fortran)


def _plain(value, depth: int, seen: set[int]):
    if isinstance(value, _Array) and value.values is not None:
        return value.values
    if isinstance(value, dict) and depth:
        if id(value) in seen:  # copying it again and again could fill the memory
            raise pickle.UnpicklingError("it holds one dict twice")
        seen.add(id(value))
        return {str(key): _plain(item, depth - 1, seen) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
