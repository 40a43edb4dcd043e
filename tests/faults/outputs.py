"""What two runs of one command must have in common, and what a killed one must not lose."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from tests.faults.jobs import Job
from tests.support.small import assert_same
from training.window import SPEEDS

OF_ONE_RUN = ("log.txt",)  # its lines carry the time
# What is to be mended: a pattern of the fault's line, and where.
KNOWN: dict[str, str] = {}
GROWING = (".jsonl", ".txt")
OF_ONE_JOB = ("drawn", "finished", "seconds", "images_per_second")  # of generate.py's record


def contents(path: Path):
    """Of a file, what two runs share: without speeds, times, what made it, and how many checkpoints stay."""
    if path.suffix == ".pt":
        value = torch.load(path, weights_only=True)
        value.pop("made_by", None)
        if "args" in value:
            value["args"].pop("checkpoints_total_limit")
        return value
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        return {key: value[key] for key in value if key not in (*OF_ONE_JOB, "checkpoints_total_limit")}
    return path.read_bytes()


def is_known(fault: str) -> bool:
    return any(re.search(pattern, fault) for pattern in KNOWN)


def files(folder: Path) -> set[str]:
    """Names of all files and folders below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def differences(folder: Path, whole: Path, names: set[str]) -> list[str]:
    """Those of the files that are not as in the undisturbed run; the first thing in which each differs."""
    found = []
    for name in sorted(names - set(OF_ONE_RUN)):
        if (whole / name).is_file() and Path(name).name not in OF_ONE_RUN:
            try:
                assert_same(contents(folder / name), contents(whole / name), name)
            except Exception as error:  # also of a file that cannot be read
                found.append(" ".join(str(error).split())[:200] or f"{name}: {type(error).__name__}")
    return found


def missing(job: Job, whole: Path) -> set[str]:
    """What the undisturbed run has written and this one has not; with a limit the newest checkpoints are enough."""
    gone = files(whole) - files(job.folder)
    if job.limit:
        newest = sorted(checkpoints(whole))[-job.limit :]
        gone = {name for name in gone if "/checkpoints/" not in name or name in newest}
    return gone


def left_over(job: Job, whole: Path) -> set[str]:
    """What this run has written and the undisturbed one has not; with a limit, checkpoints that nothing resumes from.

    Beyond the limit stay the one that the last job went on from and, if it was killed between writing a checkpoint and
    removing another, one more.
    """
    more = files(job.folder) - files(whole)
    if job.limit:
        more |= set(sorted(checkpoints(job.folder))[: -job.limit - 2])
    inside = {name for name in more if str(Path(name).parent) in more}
    return {re.sub(r"\.tmp-\d+$", ".tmp-*", name) for name in more - inside}


def checkpoints(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*/checkpoints/*.pt")}


def finished(job: Job) -> set[str]:
    """What a job that is killed now must not lose: checkpoints, and marks of what is on the disk."""
    found = checkpoints(job.folder)
    for path in job.folder.glob("*.partial.done"):
        found |= {f"batch {i}" for i, done in enumerate(path.read_bytes()) if done}
    for path in job.folder.glob("*.done.tmp-cache"):
        found |= {f"row {i}" for i in np.flatnonzero(np.load(path))}
    return found


def lost(job: Job, before: set[str], whole: Path) -> set[str]:
    """What was finished and is not any more; marks end with the result itself."""
    now = finished(job)
    gone = before - now
    if job.limit:
        kept = len(now) >= min(job.limit, len(before)) and max(now, default="") >= max(before, default="")
        gone = set() if kept else gone
    results = {name for name in files(whole) if name.endswith((".npz", ".npy"))}
    return {name for name in gone if " " not in name or not results <= files(job.folder)}


def not_whole(job: Job, whole: Path) -> list[str]:
    """Files that have their final names and are not as in the undisturbed run; not those that grow by lines.

    Of generate.py's single PNG files a killed job may leave parts: a restart writes all of them again.
    """
    there = {name for name in files(job.folder) if not name.endswith(GROWING)}
    if job.script == "generate":
        there = {name for name in there if "/" not in name}
    return differences(job.folder, whole, there)
