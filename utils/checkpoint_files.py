"""Where a run's checkpoints lie, and which there are: their names alone, so that a look needs no torch."""

import argparse
import zipfile
from pathlib import Path

from utils.errors import InputError, about


def checkpoint_path(run_dir: str | Path, step: int | str) -> Path:
    """`<run_dir>/checkpoints/<step, 7 digits>.pt`, as the public code has it."""
    return Path(run_dir) / "checkpoints" / f"{int(step):07d}.pt"


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """The steps with a checkpoint in a run's folder, from the first to the last."""
    return sorted(int(file.stem) for file in (Path(run_dir) / "checkpoints").glob("*.pt") if file.stem.isdecimal())


def latest_step(run_dir: str | Path) -> int | None:
    """The highest step with a checkpoint in a run's folder."""
    return max(checkpoint_steps(run_dir), default=None)


def find_checkpoint(run_dir: str | Path, step: int | str) -> Path:
    """The checkpoint of a step in a run's folder.

    Raises:
        InputError: there is none; the message names those that are there, and the flag is the caller's to say.
    """
    path = checkpoint_path(run_dir, step)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.pt"))) or "none"
        raise InputError(f"{path} does not exist; checkpoints there: {there}")
    return path


def find_damage(path: str | Path) -> str | None:
    """What is wrong with the bytes of a file of torch.save; None: they are as they were written.

    All of them are read: torch maps the file, and would train on flipped bits without a word.
    """
    try:
        with Path(path).open("rb") as file:
            magic = file.read(4)
        if magic[:1] == b"\x80":  # of torch before 1.6, whose files have no checksums
            return None
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        if member is None:
            from utils.torch_files import read_torch_file  # torch, which the names alone do not need

            read_torch_file(path)  # the zip's own directory has no checksum
    except Exception as error:  # zipfile raises many kinds for flipped bits
        return "not whole" if isinstance(error, zipfile.BadZipFile) else f"{type(error).__name__}: {error}"
    return member and f"the checksum of {member} is wrong"


def trained_checkpoint(exp_path: str | Path, train_steps: str | None) -> Path:
    """The checkpoint that samples are drawn with: that of `--train-steps` in the run of `--exp-path`, or its latest.

    Raises:
        InputError: no such run or checkpoint.
    """
    run_dir = Path(exp_path)
    if run_dir.is_file():  # a checkpoint by itself, such as those of REPA and SiT
        if train_steps is not None:
            raise InputError(f"--train-steps: {train_steps} was given; --exp-path {run_dir} is a checkpoint itself")
        return run_dir
    if not run_dir.is_dir():
        raise InputError(
            f"--exp-path: {run_dir} is no folder; a run's folder, with checkpoints/, is needed (public: "
            "`hf download REPA-E/sit-repae-vavae`)"
        )
    if train_steps is not None and not train_steps.isdecimal():
        raise InputError(f"--train-steps: {train_steps!r} was given; a number of steps is needed")
    step = int(train_steps) if train_steps is not None else latest_step(run_dir)
    if step is None:
        raise InputError(f"--exp-path: {run_dir} holds no checkpoint (checkpoints/<step>.pt)")
    with about("--train-steps"):
        return find_checkpoint(run_dir, step)


def require_trained(args: argparse.Namespace) -> None:
    """Refuse an --exp-path without the checkpoint; that of a preset has words of its own, and is left to them."""
    if args.preset is None:
        trained_checkpoint(args.exp_path, args.train_steps)


def require_repae_checkpoint(args: argparse.Namespace) -> None:
    """Refuse a --repae-ckpt that is not there."""
    if not Path(args.repae_ckpt).is_file():
        where = (
            "a run of train_repae.py has checkpoints/<step>.pt, and `hf download REPA-E/sit-repae-vavae` a public one"
        )
        raise InputError(f"--repae-ckpt: {args.repae_ckpt} does not exist; {where}")
