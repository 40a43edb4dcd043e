"""A checkpoint with objects of foreign classes (Lightning's callbacks), read for its tensors and plain values alone.

While the pickle is read nothing real exists but Python's own containers, text and numbers: every class or function that
the file names becomes an inert class of ours, which keeps what it is given and does nothing, whatever the file asks of
it. Tensors are made afterwards, from what the inert objects kept, and checked. So nothing of the file's ever runs.
"""

import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError
from utils.pickles import require_modest
from utils.torch_files import require_own_numbers

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
_METADATA = 6  # where torch._utils._rebuild_tensor_v2 takes it: the bits that say "negated" and "conjugated"
_LARGEST = 2**25  # bytes of the pickle, which holds no numbers of tensors; that of a large network has one million
_MOST_CLASSES = 10_000
_CHUNK = 2**20  # bytes
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
_SETS = tuple(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "frozenset"))


class _Inert:
    """Stands for an object that the file describes: keeps the arguments it was made with, and the items put into it."""

    __slots__ = ("args", "items")
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


class _Storage(_Inert):
    """Says where the numbers of a tensor lie."""

    __slots__ = ()
    name = "storage"


class _Unpickler(pickle.Unpickler):
    """Finds an inert class for every name."""

    def __init__(self, file):
        super().__init__(file)
        self.classes: dict[str, type] = {}

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full not in self.classes:
            if len(self.classes) == _MOST_CLASSES:
                raise InputError(f"it names more than {_MOST_CLASSES} classes")
            self.classes[full] = type("_Inert", (_Inert,), {"name": full, "__slots__": ()})
        return self.classes[full]

    def persistent_load(self, pid):
        return _Storage(*pid)


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
            elif not isinstance(key, str | int):  # to print or hash a tuple of tuples can take forever
                self.left_out[f"{type(key).__name__} as a key"] += 1
            elif (value := self.value(item)) is not _FOREIGN:
                made[key] = value
        return made

    def _inert(self, thing):
        name = "" if isinstance(thing, type) else thing.name  # a class by itself is always foreign
        if name == "torch._utils._rebuild_tensor_v2":
            if thing.args[_METADATA:] and thing.args[_METADATA]:  # its numbers are not what they seem
                self.left_out["tensor with metadata"] += 1
                return _FOREIGN
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
        if type(key) is not str or type(count) is not int:
            raise InputError("a storage has no name or no size")
        if key not in self.storages:
            member = self.archive.getinfo(f"{self.folder}/data/{key}")
            if member.file_size < count * dtype.itemsize:
                raise InputError(f"storage {key!r} has {member.file_size} bytes; {count} of {dtype} are needed")
            raw = self._bytes(member)
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        if self.storages[key].dtype != dtype or len(self.storages[key]) < count:
            raise InputError(f"storage {key!r} is of another kind or size")
        return self.storages[key]

    def _bytes(self, member: zipfile.ZipInfo) -> bytearray:
        """What a member holds, in memory once."""
        raw = bytearray(member.file_size)
        left = memoryview(raw)
        with self.archive.open(member) as file:
            while count := file.readinto(left[:_CHUNK]):
                left = left[count:]
        if left:
            raise InputError(f"{member.filename} is shorter than the archive says")
        return raw


def _require_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that would be larger in memory than it is.

    Raises:
        InputError: compressed members, or such as lie over each other.
    """
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise InputError("its members are compressed; torch.save stores them as they are")
    if sum(member.file_size for member in archive.infolist()) > size:
        raise InputError("its members are together larger than the file")


def read_inert(path: str | Path) -> tuple[dict, Counter[str]]:
    """The tensors and plain values of a dict that torch.save wrote as a zip (every torch since 1.6), on the CPU.

    Left out are objects of foreign classes, entries whose key is no text or whole number, and tensors that are stored
    with a sign or conjugation still to be applied. Tuples and sets come as lists. It takes no more memory than the file
    has bytes of numbers, and some hundred times those of its pickle.

    Returns:
        the dict, and how many objects of which class, or what else, were left out.

    Raises:
        InputError: no such zip, compressed, truncated, or something in it is not what it must be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _require_stored(archive, Path(path).stat().st_size)
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("/data.pkl")
            if f"{folder}/byteorder" in archive.namelist() and archive.read(f"{folder}/byteorder") != b"little":
                raise InputError("its numbers are big-endian")
            if archive.getinfo(pickled).file_size > _LARGEST:
                raise InputError(f"its pickle has more than {_LARGEST >> 20} MB")
            data = archive.read(pickled)
            require_modest(data)
            described = _Unpickler(io.BytesIO(data)).load()
            reader = _Reader(archive, folder)
            contents = reader.value(described)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except Exception as error:  # whatever a malformed pickle runs into, in Python's reader or in ours
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds no dict of tensors; one is needed")
    require_own_numbers(contents, Path(path))
    return contents, reader.left_out
