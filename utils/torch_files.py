"""Files of `torch.save`, read without unpickling anything but tensors and plain values."""

import argparse
import pickle
import re
from pathlib import Path

import torch

from utils.errors import InputError


class ForeignObject(InputError):
    """The file holds an object of a class that is not allowed."""


def read_torch_file(path: str | Path) -> dict:
    """A dict written by `torch.save`, on the CPU, memory-mapped where the file allows it.

    Raises:
        ForeignObject: the file holds a class that is not allowed; the message names it.
        InputError: the file is missing, truncated or no torch file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    is_zip = path.open("rb").read(4) == b"PK\x03\x04"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error)):
            found = f"{path} holds an object of {refused[1]}"
            raise ForeignObject(f"{found}; only tensors and plain values are loaded") from None
        raise InputError(f"{path} is no torch checkpoint (truncated, or another kind of file)") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}; a dict is needed")
    return contents
