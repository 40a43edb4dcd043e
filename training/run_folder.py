"""A run's folder: whether it may be taken, which checkpoint in it is resumed, and what is made in it."""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path

from configs.parsing import flag_of
from training.trackers import WANDB_RUN
from utils.checkpoint import find_checkpoint, latest_step
from utils.errors import InputError, about, printable
from utils.files import read_object, require_writable, write_json

logger = logging.getLogger(__name__)

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
# What a run puts into its folder; `--overwrite` removes these, the tracker's folder and nothing else.
RUN_FILES = ("args.json", "checkpoints", "samples", METRICS, EVALUATIONS, "log.txt", "latents-stats.pt", WANDB_RUN)
# How a run goes on may differ from how it began; and what is no flag.
FREE_TO_CHANGE = ("resume", "resume_step", "continue_train_exp_dir", "overwrite", "seen_classes")
# What args.json of older runs says where nothing was given; not given now either, nothing has changed.
FORMER_DEFAULTS = {"epochs": 1400}


def resume_point(args: argparse.Namespace, folder: Path) -> tuple[int, Path | None]:
    """The step that the run starts from, and its checkpoint; (0, None) for a fresh run.

    Raises:
        InputError: the flags contradict each other, or name a checkpoint that does not exist.
    """
    if args.resume is not None and args.resume_step:
        raise InputError("--resume and --resume-step were both given; one is needed")
    if args.resume is not None and args.resume != "latest" and not args.resume.isdigit():
        raise InputError(f"--resume: {args.resume!r} was given; 'latest' or a step is needed")
    source = Path(args.continue_train_exp_dir or folder)
    step = args.resume_step or args.resume
    if step == "latest":
        step = latest_step(source)  # None: a cluster job may always be started with --resume latest
    if not step:
        return 0, None
    with about("--resume"):
        return int(step), find_checkpoint(source, step)


def require_free(args: argparse.Namespace, folder: Path) -> None:
    """Refuse a folder that a fresh run may not take.

    Raises:
        InputError: it holds something, and neither `--overwrite` nor `--resume latest` says that it may.
    """
    restarting = args.resume == "latest"  # an earlier job may have died before its first checkpoint
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--exp-name: {folder} is a file")
    require_writable(folder / "args.json", "--output-dir")
    if not folder.exists() or not any(folder.iterdir()) or (restarting and (folder / "args.json").is_file()):
        return
    if not args.overwrite:
        raise InputError(f"--exp-name: {folder} exists already; give another name, --resume latest or --overwrite")
    if not (folder / "args.json").is_file():
        raise InputError(f"--overwrite: {folder} has no args.json, so it is no run folder and is left alone")


def clear(folder: Path, logging_dir: str) -> None:
    """Remove an earlier run of this name, and nothing else: a --logging-dir that lies elsewhere is left alone."""
    logs = folder / logging_dir
    inside = folder.resolve() in logs.resolve().parents
    for path in (*(folder / name for name in RUN_FILES), *([logs] if inside else [])):
        is_folder = path.is_dir() and not path.is_symlink()  # of a link the link alone goes
        shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def make(folder: Path, args: argparse.Namespace, start_step: int) -> None:
    """The folder of a run that starts or goes on from this step."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for unfinished in checkpoints.glob("*.tmp-*"):  # of a job that was killed
        unfinished.unlink()
    write_json(folder / "args.json", vars(args))
    _forget_rows_after(folder, start_step)


def changed_flags(
    folder: Path, args: argparse.Namespace, start_step: int, from_checkpoint: tuple[str, ...] = ()
) -> list[str]:
    """Notes on flags that had other values in the run's earlier part; those `from_checkpoint` are not read again."""
    file = folder / "args.json"
    before = read_object(file) if file.is_file() else {}
    changed = {key: value for key, value in vars(args).items() if key in before and before[key] != value}
    notes = []
    for key, value in changed.items():
        flag = flag_of(key)
        if key in from_checkpoint and value is not None:
            notes.append(f"{flag} {value} is not read: the run goes on from the checkpoint of step {start_step}")
        elif key not in (*FREE_TO_CHANGE, *from_checkpoint) and not (
            value is None and before[key] == FORMER_DEFAULTS.get(key)
        ):
            notes.append(f"{flag} was {before[key]} until step {start_step}; now {value}")
    return [printable(note) for note in notes]


def _forget_rows_after(folder: Path, step: int) -> None:
    """A run that goes on from an earlier step writes the rows after it again. What is no row is left out, and said."""
    for path in filter(Path.is_file, (folder / METRICS, folder / EVALUATIONS)):
        lines = path.read_text(errors="replace").split("\n")[:-1]  # a killed job may leave a part of the last one
        steps = [_step_of(line) for line in lines]
        if damaged := steps.count(None):
            logger.warning("%s: %d damaged lines are left out", path, damaged)
        rows = zip(lines, steps, strict=True)
        path.write_text("".join(f"{line}\n" for line, of in rows if of is not None and of <= step))


def _step_of(line: str) -> int | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row["step"] if isinstance(row, dict) and type(row.get("step")) is int else None


def open_log(folder: Path) -> list[logging.Handler]:
    """Messages go to `log.txt` and to stderr; returns the handlers, for whoever ends the run."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    handlers = [logging.FileHandler(folder / "log.txt"), logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    for noisy in ("httpx", "filelock", "PIL", "wandb"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return handlers
