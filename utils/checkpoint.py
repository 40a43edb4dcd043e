"""Training checkpoints: written whole or not at all, read without unpickling anything but tensors and plain values.

The dict has the public names (`model`, `ema`, `vae`, `discriminator`, `opt`, `opt_vae`, `opt_disc`, `args`, `steps`)
and ours (`format`, `vae_config`, `scalers`, `loss_buffers`, `param_names`). Public files, whose `args` is a pickled
argparse.Namespace, load too.
"""

import argparse
import errno
import pickle
import re
from pathlib import Path

import torch
from torch import nn

from utils.errors import InputError
from utils.files import atomic_write

FORMAT = 1


def read_torch_file(path: str | Path) -> dict:
    """A dict written by `torch.save`, on the CPU, memory-mapped where the file allows it.

    Raises:
        InputError: the file is missing, truncated, no torch file, or holds a class that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    is_zip = path.open("rb").read(4) == b"PK\x03\x04"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"{path} holds an object of {refused[1]}; only tensors and plain values are loaded"
            ) from None
        raise InputError(f"{path} is no torch checkpoint (truncated, or another kind of file)") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is truncated or no torch checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}; a dict is needed")
    return contents


def read_checkpoint(path: str | Path, *, need: tuple[str, ...] = ("model", "ema")) -> dict:
    """A training checkpoint, ours or public, with `args` as a plain dict; `need` names entries that must be there."""
    checkpoint = read_torch_file(path)
    missing = [key for key in need if key not in checkpoint]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8]))
        raise InputError(f"{path} is no checkpoint of this kind: it lacks the entry {missing[0]!r} and holds {found}")
    if checkpoint.get("format", FORMAT) > FORMAT:
        raise InputError(f"{path} has format {checkpoint['format']}; this code reads up to {FORMAT}")
    args = checkpoint.get("args", {})
    checkpoint["args"] = dict(vars(args)) if isinstance(args, argparse.Namespace) else args
    for key in ("args", *need):
        if key != "steps" and not isinstance(checkpoint[key], dict):
            raise InputError(f"{path}: {key} is a {type(checkpoint[key]).__name__}; a dict is needed")
    return checkpoint


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


def checkpoint_path(run_dir: str | Path, step: int | str) -> Path:
    return Path(run_dir) / "checkpoints" / f"{int(step):07d}.pt"


def latest_step(run_dir: str | Path) -> int | None:
    """The highest step with a checkpoint in a run's folder."""
    steps = [int(file.stem) for file in (Path(run_dir) / "checkpoints").glob("*.pt") if file.stem.isdigit()]
    return max(steps, default=None)


def load_strictly(module: nn.Module, state: dict, what: str) -> None:
    """`load_state_dict` whose errors are one line that names the first key that does not fit."""
    own = module.state_dict()
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"holds the unknown key {key}" for key in state if key not in own]
    problems += [
        f"has {key} of shape {tuple(state[key].shape)}; {tuple(own[key].shape)} is needed"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{what} {problems[0]}{more}")
    module.load_state_dict(state)
