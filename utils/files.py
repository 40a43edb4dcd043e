"""Files that get their final name only when they are whole, and room for them checked beforehand."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.errors import InputError

_DEEPEST = 20  # objects and lists in each other in a JSON file
_KINDS = {int: "a whole number", str: "a text", list: "a list"}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write; it becomes `path` when the block ends, and is removed when the block fails.

    A reader sees the old file or the new one, never a part, even after a power cut. Missing folders are made. What a
    killed process has left of this file is removed.
    (`np.save` adds ".npy" to the temporary name: hand it an open file instead.)

    Args:
        path: the final name.
    Yields:
        `<name>.tmp-<pid>` in the same folder; the block must create it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_abandoned(path: Path) -> None:
    """Remove `<name>.tmp-<pid>` of processes that are no more; files and folders."""
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        pid = temporary.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(path: str | os.PathLike, offset: int, data) -> None:
    """Overwrite the bytes of a file from `offset` on with a contiguous buffer, and bring them to the disk.

    Unlike a shared memory map, a full disk is an OSError, and other processes' neighbouring bytes stay theirs: opened
    so, Linux's NFS client sends these bytes alone, not the whole pages they lie in.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_DSYNC)
    try:
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(descriptor, left, offset)
            left, offset = left[written:], offset + written
    finally:
        os.close(descriptor)


def read_object(path: str | os.PathLike, **kinds: type) -> dict:
    """The object in a JSON file.

    Args:
        kinds: of entries, where they are there and not null.
    Raises:
        InputError: as `read_json`; or no object, or an entry of another kind.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed")
    require_kinds(value, str(path), **kinds)
    return value


def read_json(path: str | os.PathLike) -> object:
    """What a JSON file holds, ours or another program's.

    Raises:
        InputError: missing, no ordinary file (a pipe could block for ever), no JSON, or nested deeper than any that is
            in use, so that no reader has to mind Python's limit.
    """
    try:
        if not Path(path).is_file():
            raise OSError("no such file")
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows begins files with a mark
        _require_flat(value)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    return value


def require_kinds(entries: Mapping, what: str, **kinds: type) -> None:
    """Refuse a mapping that a file holds where an entry is there, is not None, and is of another kind.

    Raises:
        InputError: the first such entry.
    """
    for name, kind in kinds.items():
        if not (entries.get(name) is None or type(entries[name]) is kind):
            raise InputError(f"{what}: {name} is a {type(entries[name]).__name__}; {_KINDS[kind]} is needed")


def _require_flat(value: object) -> None:
    level = [[value]]
    for _ in range(_DEEPEST):
        inner = (thing.values() if isinstance(thing, dict) else thing for thing in level)
        level = [thing for things in inner for thing in things if isinstance(thing, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} times")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def differences(earlier: Mapping, now: Mapping) -> str:
    """What two descriptions of a job differ in, as `name: earlier, now ...`; nested ones by their own entries."""
    found = []
    for key in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [differences(before, after)] if before != after else []
        elif before != after:
            found.append(f"{key}: {before}, now {after}")
    return "; ".join(found)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(path: str | os.PathLike, flag: str) -> None:
    """Refuse a path at which no file could be made; nothing is written.

    Raises:
        InputError: the path is a folder, or the nearest folder above it is a file or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag}: {path} is a folder; the name of a file is needed")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{flag}: {parent} is no folder that can be written")


def require_disk(path: str | os.PathLike, bytes_needed: int, what: str) -> None:
    """Refuse to start writing what the disk cannot hold.

    Args:
        path: file or folder that will be written; it need not exist yet.
        bytes_needed: how much will be written there.
        what: beginning of the message, with the flag: "--output-path: the images".
    Raises:
        InputError: less is free on the file system of `path`.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        needed, free = bytes_needed / 1e9, free / 1e9
        raise InputError(f"{what}: {needed:.3g} GB are needed on the disk of {path}, {free:.3g} GB are free")
