"""Files of `torch.save`, read without unpickling anything but tensors and plain values."""

import argparse
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError

_PROTOCOL = torch.serialization.DEFAULT_PROTOCOL
_UNPACKED = 20  # times larger a packed file may become; of weights it is 1.1 times
_SMALL = 2**28  # bytes that it may have in any case
_SHARED = 4  # numbers for each byte of a file: tensors may share them


class NotPlain(InputError):
    """The file's pickle holds something that torch's reader of tensors and plain values does not take."""


class ForeignObject(NotPlain):
    """The file holds an object of a class that is not allowed."""


def read_torch_file(path: str | Path) -> dict:
    """A dict written by `torch.save`, on the CPU, memory-mapped where the file allows it.

    A zip with compressed members, which other programs make of a file, is read into memory.

    Raises:
        NotPlain: it is written in a way that is not read.
        ForeignObject: the file holds a class that is not allowed; the message names it.
        InputError: the file is missing, truncated or no torch file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        is_stored = is_stored_zip(path)
        _require_modest(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read ends in an error
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            found = f"{path} holds an object of {refused[1]}"
            raise ForeignObject(f"{found}; only tensors and plain values are loaded") from None
        if (protocol := _protocol(path)) not in (None, _PROTOCOL):
            raise NotPlain(f"{path} has pickle protocol {protocol}; torch.save's own, {_PROTOCOL}, is needed") from None
        raise NotPlain(f"{path} is no torch checkpoint (truncated, or another kind of file)") from None
    except InputError:
        raise
    except Exception as error:  # whatever a malformed pickle runs into in torch's reader
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}; a dict is needed")
    require_own_numbers(contents, path)
    return contents


def require_own_numbers(contents: Mapping, path: Path) -> None:
    """Refuse a file whose tensors would be far larger in use than it is: repeated by a stride of 0, or without numbers.

    Raises:
        InputError: the file describes more numbers than it can hold, or a tensor that is not an ordinary one.
    """
    count, seen, waiting = 0, set(), [contents]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:  # containers may hold each other
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.device.type != "cpu" or thing.layout != torch.strided or thing.is_quantized:
                found = "a tensor that is sparse, quantised or without numbers"
                raise InputError(f"{path} holds {found}; plain tensors are needed")
            count += thing.numel()
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set):
            waiting += thing
    if count > max(_SMALL // 4, _SHARED * _unpacked_size(path)):
        raise InputError(f"{path} describes tensors of {count} numbers, more than the file can hold")


def _unpacked_size(path: Path) -> int:
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _require_modest(path: Path) -> None:
    """Refuse what would fill the memory while it is read: a packed file of zeros, or a buffer of any length."""
    size = _unpacked_size(path)
    if size > max(_SMALL, _UNPACKED * path.stat().st_size):
        raise InputError(f"{path} unpacks to {size / 1e9:.3g} GB, as no weights do")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        has_buffer = any(b"bytearray" in data for data in pickles)
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            has_buffer = data.find(b"bytearray") >= 0
    if has_buffer:
        raise ForeignObject(f"{path} holds an object of builtins.bytearray; only tensors and plain values are loaded")


def is_stored_zip(path: Path) -> bool:
    """A zip whose members lie in it as they are: torch maps a compressed one all the same, and reads garbage."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch before 1.6
            return False
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _protocol(path: Path) -> int | None:
    """The pickle protocol of a zip's contents; None: unknown."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(pickled) as file:
                mark, protocol = file.read(2)
    except (ValueError, OSError, zipfile.BadZipFile):
        return None
    return protocol if bytes([mark]) == pickle.PROTO else None
