"""Files that get their final name only when they are whole, and room for them checked beforehand."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path to write; it becomes `path` when the block ends, and is removed when the block fails.

    A reader sees the old file or the new one, never a part, even after a power cut. Missing folders are made.
    (`np.save` adds ".npy" to the temporary name: hand it an open file instead.)

    Args:
        path: the final name.
    Yields:
        `<name>.tmp-<pid>` in the same folder; the block must create it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: str | os.PathLike) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(path: str | os.PathLike, offset: int, data) -> None:
    """Overwrite the bytes of a file from `offset` on with a contiguous buffer; `sync` then brings them to the disk.

    Unlike a shared memory map, a full disk is an OSError, and other processes' neighbouring bytes stay theirs.
    """
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
