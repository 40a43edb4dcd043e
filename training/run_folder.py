"""A run's folder: whether it may be taken, which checkpoint in it is resumed, and what is made in it."""

import argparse
import itertools
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from configs.parsing import flag_of
from training.trackers import WANDB_RUN
from utils.checkpoint_files import checkpoint_path, checkpoint_steps, find_checkpoint, find_damage
from utils.errors import InputError, about, printable
from utils.files import atomic_write, read_object, require_writable, write_json

logger = logging.getLogger(__name__)

METRICS, EVALUATIONS, BAD_STEPS = "metrics.jsonl", "evaluations.jsonl", "bad-step-*.json"
LOCK = "run.lock"  # held by the job that trains
# What a run puts into its folder; `--overwrite` removes these, BAD_STEPS, the tracker's folder and nothing else.
RUN_FILES = ("checkpoints", "samples", METRICS, EVALUATIONS, "log.txt", "latents-stats.pt", WANDB_RUN, "args.json")
# How a run goes on may differ from how it began; and what is no flag.
FREE_TO_CHANGE = (
    *("resume", "resume_step", "continue_train_exp_dir", "overwrite", "seen_classes"),
    *("max_hours", "checkpoints_total_limit", "keep_every"),
)
# What args.json of older runs says where nothing was given; not given now either, nothing has changed.
FORMER_DEFAULTS = {"epochs": 1400}


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / args.exp_name


class Start(NamedTuple):
    """Where a run starts from; the defaults are those of a fresh run."""

    step: int = 0
    checkpoint: Path | None = None
    goes_on: bool = False  # whether the checkpoint lies in the run's own folder
    notes: tuple[str, ...] = ()
    there: tuple[int, ...] = ()  # steps with a checkpoint in the run's own folder


def starting_point(args: argparse.Namespace, *, whole: bool = False) -> Start:
    """Where a run starts from, by its flags and by what is there; nothing is written.

    Args:
        whole: read every byte of the checkpoint (7 GB took 1.4 seconds). `latest` is then the newest that is as it was
            written, and the notes name those that are not.

    Raises:
        InputError: the flags contradict each other, or name a checkpoint that does not exist or is damaged, or a folder
            that is taken.
    """
    folder = run_folder(args)
    step, checkpoint, notes = _resume_point(args, folder, whole)
    goes_on = checkpoint is not None and checkpoint.parent.parent.resolve() == folder.resolve()
    if not goes_on:
        _require_free(args, folder)
    return Start(step, checkpoint, goes_on, tuple(notes), tuple(checkpoint_steps(folder)))


def _resume_point(args: argparse.Namespace, folder: Path, whole: bool) -> tuple[int, Path | None, list[str]]:
    if args.resume is not None and args.resume_step:
        raise InputError("--resume and --resume-step were both given; one is needed")
    if args.resume is not None and args.resume != "latest" and not args.resume.isdecimal():
        raise InputError(f"--resume: {args.resume!r} was given; 'latest' or a step is needed")
    source = Path(args.continue_train_exp_dir or folder)
    with about("--resume"):
        if args.resume == "latest":
            # A job that is started again goes on in its own folder, whichever it began from.
            return _newest(folder if checkpoint_steps(folder) else source, whole)
        step = int(args.resume or 0) or args.resume_step
        if not step:
            return 0, None, []
        path = find_checkpoint(source, step)
        if whole and (damage := find_damage(path)):
            raise InputError(f"{path} is damaged: {damage}")
        return step, path, []


def _newest(source: Path, whole: bool) -> tuple[int, Path | None, list[str]]:
    """The newest checkpoint of a run's folder; none where there is none yet: a cluster's job may always ask for it."""
    notes = []
    for step in reversed(checkpoint_steps(source)):
        path = checkpoint_path(source, step)
        damage = find_damage(path) if whole else None
        if damage is None:
            return step, path, notes
        notes.append(f"{path} is damaged ({damage}); the one before it is taken")
    if notes:
        raise InputError(f"every checkpoint in {source / 'checkpoints'} is damaged; move them away to start afresh")
    return 0, None, []


def _require_free(args: argparse.Namespace, folder: Path) -> None:
    """Refuse a folder that holds something, where neither `--overwrite` nor `--resume latest` says that it may."""
    restarting = args.resume == "latest"  # an earlier job may have died before its first checkpoint
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--exp-name: {folder} is a file")
    require_writable(folder / "args.json", "--output-dir")
    # A job that died before its args.json was there is nobody's loss.
    if not folder.exists() or all(path.name == LOCK or ".tmp-" in path.name for path in folder.iterdir()):
        return
    if restarting and (folder / "args.json").is_file():
        return
    if not args.overwrite:
        raise InputError(f"--exp-name: {folder} exists already; give another name, --resume latest or --overwrite")
    if not (folder / "args.json").is_file():
        raise InputError(f"--overwrite: {folder} has no args.json, so it is no run folder and is left alone")


def clear(folder: Path, logging_dir: str) -> None:
    """Remove an earlier run of this name, and nothing else: a --logging-dir that lies elsewhere is left alone."""
    logs = folder / logging_dir
    inside = folder.resolve() in logs.resolve().parents
    named = *folder.glob(BAD_STEPS), *([logs] if inside else []), *(folder / name for name in RUN_FILES)
    for path in named:  # args.json last: until then it is a run's folder, which --overwrite may clear
        is_folder = path.is_dir() and not path.is_symlink()  # of a link the link alone goes
        shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def bad_step_path(folder: Path, done: int) -> Path:
    """Of the record of a step, counted from 1, that ended a run."""
    return folder / BAD_STEPS.replace("*", f"{done:07d}")


def set_aside_after(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints after the one that a run goes on from, so that no later job takes them for its own.

    They are of another course of the run, whose rows are forgotten too, or damaged. Returns notes.
    """
    notes = []
    for later in [later for later in checkpoint_steps(folder) if later > step]:
        path = checkpoint_path(folder, later)
        names = (path.with_name(f"{path.name}.set-aside{number or ''}") for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        notes.append(f"{path} is later than step {step}, from which the run goes on: it is now {aside.name}")
    return notes


def make(folder: Path, args: argparse.Namespace, start_step: int) -> None:
    """The folder of a run that starts or goes on from this step."""
    write_json(folder / "args.json", vars(args))  # first: with it the folder is a run's, which may be gone on with
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for place in (folder, checkpoints, folder / "samples"):
        for unfinished in filter(Path.is_file, place.glob("*.tmp-*")):  # of a job that was killed; no other is here
            unfinished.unlink()
    _forget_rows_after(folder, start_step)


def changed_flags(
    folder: Path, args: argparse.Namespace, start_step: int, from_checkpoint: tuple[str, ...] = ()
) -> list[str]:
    """Notes on flags that had other values in the run's earlier part; those `from_checkpoint` are not read again."""
    file = folder / "args.json"
    before, notes = {}, []
    if file.is_file():
        try:
            before = read_object(file)
        except InputError as error:  # it is written anew, and what counts is in the checkpoint
            notes.append(f"the run's earlier options cannot be read: {error}")
    changed = {key: value for key, value in vars(args).items() if key in before and before[key] != value}
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
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line, of in rows if of is not None and of <= step))


def lacks_evaluation(folder: Path, step: int) -> bool:
    """Whether no row of this step is on file: the job ended before it, or within it."""
    path = folder / EVALUATIONS
    return not path.is_file() or step not in map(_step_of, path.read_text(errors="replace").split("\n"))


def lacks_pictures(folder: Path, step: int) -> bool:
    """Whether a step's pictures may not all be there: one is sure of it only beside another step's."""
    counts = Counter(path.name.split("-")[0] for path in (folder / "samples").glob("*.png"))
    found = counts.pop(f"{step:07d}", 0)
    return not found or found < max(counts.values(), default=found + 1)


def _step_of(line: str) -> int | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row["step"] if isinstance(row, dict) and type(row.get("step")) is int else None
