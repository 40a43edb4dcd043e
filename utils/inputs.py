"""Whether what a job reads is there: told by a look at the file system, before torch and its like are imported."""

import argparse
from pathlib import Path

from utils.errors import InputError


def require_inputs(args: argparse.Namespace) -> None:
    """Refuse a missing data folder within a fraction of a second; a plan (--dry-run) needs none.

    Raises:
        InputError: as `require_data_folder`, which the job's own reader asks again.
    """
    if getattr(args, "dry_run", None) is None:
        require_data_folder(Path(args.data_dir), getattr(args, "resolution", None))


def preprocessing_command(folder: Path, resolution: int | None) -> str:
    """Advice: what writes this data folder."""
    size = f" --resolution {resolution}" if resolution not in (None, 256) else ""
    return f"run: python preprocessing.py --imagenet-path /PATH/TO/IMAGES --output-path {folder}{size}"


def require_data_folder(folder: Path, resolution: int | None) -> None:
    """Refuse a folder without the files of a data folder.

    Raises:
        InputError: it is missing, or one of its files is.
    """
    command = preprocessing_command(folder, resolution)
    if not folder.is_dir():
        raise InputError(f"--data-dir: {folder} is not a folder; {command}")
    missing = [name for name in ("images.npy", "labels.npy", "dataset.json") if not (folder / name).is_file()]
    if "images.npy" in missing and (folder / "images.h5").exists():
        found = f"{folder} holds images.h5 of the public release; images.npy is needed"
        raise InputError(f"--data-dir: {found}. Run preprocessing.py again ({command})")
    if missing:
        raise InputError(f"--data-dir: {folder} lacks {', '.join(missing)}; {command}")
