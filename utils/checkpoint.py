"""Training checkpoints: what they hold, where they lie, written whole or not at all.

The dict has the public names (`model`, `ema`, `vae`, `discriminator`, `opt`, `opt_vae`, `opt_disc`, `args`, `steps`)
and ours (`format`, `vae_config`, `scalers`, `loss_buffers`, `param_names`). Public files, whose `args` is a pickled
argparse.Namespace, load too.
"""

import argparse
import errno
from pathlib import Path

import torch

from utils.errors import InputError
from utils.files import atomic_write
from utils.torch_files import read_torch_file

FORMAT = 1


def read_checkpoint(path: str | Path, *, need: tuple[str, ...] = ("model", "ema")) -> dict:
    """A training checkpoint, ours or public, with `args` as a plain dict.

    Args:
        need: entries that must be there.

    Raises:
        InputError: the file is missing or unreadable, lacks an entry, or has a later format than this code's.
    """
    checkpoint = read_torch_file(path)
    require_entries(checkpoint, path, need)
    version = checkpoint.get("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise InputError(f"{path} has format {version!r}; this code reads up to {FORMAT}")

    # The public code pickled argparse's Namespace.
    args = checkpoint.get("args", {})
    checkpoint["args"] = dict(vars(args)) if isinstance(args, argparse.Namespace) else args
    require_entries(checkpoint, path, ("args",))
    return checkpoint


def require_entries(checkpoint: dict, path: str | Path, need: tuple[str, ...]) -> None:
    """Refuse a checkpoint without these entries; each but `steps` must be a dict.

    Raises:
        InputError: the first that is missing, or no dict.
    """
    missing = [key for key in need if key not in checkpoint]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8]))
        raise InputError(f"{path} is no checkpoint of this kind: it lacks the entry {missing[0]!r} and holds {found}")
    for key in need:
        if key != "steps" and not isinstance(checkpoint[key], dict):
            raise InputError(f"{path}: {key} is a {type(checkpoint[key]).__name__}; a dict is needed")


def write_checkpoint(path: str | Path, contents: dict) -> None:
    """Save under a temporary name, flush to disk, rename: a file of this name is always whole.

    Raises:
        OSError: it could not be written, for which torch has an error of its own.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save({"format": FORMAT, **contents}, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "not written: no space left, or the disk failed", str(path)) from None
