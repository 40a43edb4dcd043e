"""A checkpoint with objects of foreign classes (Lightning's callbacks), read for its tensors and plain values alone.

While the pickle is read nothing real exists but Python's own containers, text and numbers: every class or function that
the file names becomes an inert class of ours, which keeps what it is given and does nothing, whatever the file asks of
it. Tensors are made afterwards, from what the inert objects kept, and checked. So nothing of the file's ever runs.
"""

import pickle
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_FOREIGN = object()
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
_SETS = tuple(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "frozenset"))


class _Inert:
    """Stands for an object that the file describes: keeps the arguments it was made with, and the items put into it."""

    name = ""  # of the class or function that the file asked for

    def __new__(cls, *args, **_):
        self = super().__new__(cls)
        self.args, self.items = args, []
        return self

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        self.items.append((key, value))

    def append(self, _):
        pass

    extend = add = append


class _Unpickler(pickle.Unpickler):
    """Finds an inert class for every name, and for a tensor's storage what says where it lies."""

    def __init__(self, file):
        super().__init__(file)
        self.classes: dict[str, type] = {}

    def find_class(self, module, name):
        full = f"{module}.{name}"
        return self.classes.setdefault(full, type("_Inert", (_Inert,), {"name": full}))

    def persistent_load(self, pid):
        return type("_Inert", (_Inert,), {"name": "storage"})(*pid)


class _Reader:
    """Makes what the inert objects describe: tensors, dicts, and what holds them; other classes are left out."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        self.made: dict[int, object] = {}  # by identity: containers may hold each other, and share
        self.left_out: Counter[str] = Counter()

    def value(self, thing):
        """The plain value or tensor; `_FOREIGN` for an object of a foreign class, which is counted."""
        if isinstance(thing, type | _Inert) or type(thing) in (dict, list, tuple, set, frozenset):
            if id(thing) not in self.made:
                self.made[id(thing)] = _FOREIGN  # what a container that holds itself finds inside
                self.made[id(thing)] = self._inert(thing) if isinstance(thing, type | _Inert) else self._plain(thing)
            return self.made[id(thing)]
        return thing

    def _plain(self, thing):
        if not isinstance(thing, dict):
            return [value for item in thing if (value := self.value(item)) is not _FOREIGN]
        return self._dict(thing.items())

    def _dict(self, items):
        made = {}
        for key, item in items:
            if isinstance(key, type | _Inert):
                self.value(key)  # counts a foreign class
            elif (value := self.value(item)) is not _FOREIGN:
                made[key] = value
        return made

    def _inert(self, thing):
        name = "" if isinstance(thing, type) else thing.name  # a class by itself is always foreign
        if name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*thing.args[:4])
        if name in _PARAMETERS:
            data = thing.args[0]
            return self.value(data) if isinstance(data, _Inert) else _FOREIGN
        if name in _DICTS:
            return self._dict(thing.items)
        if name in _SETS and len(thing.args) == 1:
            return self.value(thing.args[0])
        self.left_out[thing.name] += 1
        return _FOREIGN

    def _tensor(self, storage, offset, size, stride):
        kind = storage.args[1].name
        if kind.removeprefix("torch.") not in _STORAGES:
            self.left_out[kind] += 1
            return _FOREIGN
        numbers = [offset, *size, *stride]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError("a tensor's shape is no list of numbers")
        return torch.as_strided(self._storage(storage), size, stride, offset)  # checks the bounds

    def _storage(self, storage) -> Tensor:
        """The numbers that a storage holds, (N,)."""
        _, kind, key, _, count = storage.args
        dtype = _STORAGES[kind.name.removeprefix("torch.")]
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        if self.storages[key].dtype != dtype or len(self.storages[key]) < count:
            raise InputError(f"storage {key!r} is of another kind or size")
        return self.storages[key]


def read_inert(path: str | Path) -> tuple[dict, Counter[str]]:
    """The tensors and plain values of a dict that torch.save wrote as a zip (every torch since 1.6), on the CPU.

    Entries of foreign classes are left out; tuples and sets come as lists.

    Returns:
        the dict, and how many objects of which class were left out.

    Raises:
        InputError: no such zip, truncated, or something in it is not what it must be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("/data.pkl")
            if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
                raise InputError("its numbers are big-endian")
            with archive.open(pickled) as file:
                described = _Unpickler(file).load()
            reader = _Reader(archive, folder)
            contents = reader.value(described)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except Exception as error:  # whatever a malformed pickle runs into, in Python's reader or in ours
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds no dict of tensors; one is needed")
    return contents, reader.left_out
