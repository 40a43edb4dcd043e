"""Files of `torch.save`, read without unpickling anything but tensors and plain values."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.errors import InputError

_PROTOCOL = torch.serialization.DEFAULT_PROTOCOL


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
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}; a dict is needed")
    return contents


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
