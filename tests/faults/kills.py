"""Jobs that are killed at random moments, by the clock or between two looks at their files, and started again."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import evaluation.online
from dataset.latent_cache import LatentCache
from tests.faults import outputs
from tests.faults.jobs import Job
from tests.support.evaluation_data import few_sampling_steps
from tests.support.forks import Fork
from utils.errors import REQUEUE

# What a process does with the names of files; what is written in between is what the clock's moments are for.
LOOKS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")
STARTS = 3  # of a job that are disturbed, at most
_CODES = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (-signal.SIGTERM, REQUEUE)}  # of a killed job


@dataclass(frozen=True)
class Kill:
    """A signal, to the main process alone or to all of its group, after so many seconds or before that look."""

    number: int
    to_group: bool
    seconds: float | None = None
    look: int | None = None

    def __str__(self) -> str:
        when = f"look {self.look}" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"{'group' if self.to_group else 'main'} at {when}"

    def send(self, pid: int) -> None:
        try:
            (os.killpg if self.to_group else os.kill)(pid, self.number)
        except ProcessLookupError:  # no group yet, or ended by itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.number)


@dataclass
class Undisturbed:
    """A run that nothing disturbed: its outputs, its seconds, and how often it looked at its folder."""

    folder: Path
    seconds: float
    looks: int


@dataclass
class Outcome:
    """Of a script and a signal: how many jobs were run, kills, starts after one, and what went wrong with what."""

    jobs: int = 0
    kills: int = 0
    restarts: int = 0
    survived: int = 0  # those whose command ended well
    equal: int = 0
    clean: int = 0
    faults: list[str] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)


def run_undisturbed(job: Job, root: Path) -> Undisturbed:
    """The outputs that all others are compared with, in `<root>/whole/<script>`."""
    counter, began = root / "looks", time.perf_counter()
    done = _start(job, counter, disturbed=False).wait()
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    whole = root / "whole" / job.script
    whole.parent.mkdir(exist_ok=True)
    job.folder.rename(whole)
    looks = counter.stat().st_size
    counter.unlink()
    return Undisturbed(whole, seconds, looks)


def run_all(job: Job, number: int, whole: Undisturbed, *, kills: int, seed: int, patience: float = 12.0) -> Outcome:
    """Jobs of a script until so many kills have met them; their helpers are given `patience` seconds to notice."""
    outcome, draw = Outcome(), random.Random(f"{seed} {job.script} {number}")
    while outcome.kills < kills:
        run_killed(job, number, whole, draw, outcome, draw.randint(1, min(STARTS, kills)))
    if orphans := end_orphans(outcome.groups, patience):
        outcome.faults.append(f"{job.script}: {orphans} helper processes stay when the main one is killed")
    return outcome


def run_killed(job: Job, number: int, whole: Undisturbed, draw: random.Random, outcome: Outcome, kills: int) -> None:
    """A job that is killed so many times, if it does not end before, and then left alone; added to the outcome."""
    shutil.rmtree(job.folder, ignore_errors=True)
    outcome.jobs += 1
    counter, before, history = whole.folder.parent / "looks", set(), []
    for start in range(kills + 1):
        kill = _moment(number, whole, draw) if start < kills else None
        done = _run(job, counter, kill, outcome.groups)
        outcome.restarts += start > 0
        history.append(f"{kill or 'alone'}: {done.returncode}")
        problems = [f"lost: {name}" for name in sorted(outputs.lost(job, before, whole.folder))]
        problems += [f"not whole: {name}" for name in outputs.not_whole(job, whole.folder)]
        if "Traceback" in done.stderr and done.returncode >= 0:  # else of a helper whose parent is gone
            problems.append(f"a traceback: {done.stderr.splitlines()[-1]}")
        was_killed = kill is not None and done.returncode in _CODES[number]
        if was_killed:
            outcome.kills += 1
            before = outputs.finished(job)
        else:
            problems += _end(job, done, whole.folder, outcome)
        outcome.faults += [f"{job.script}: {problem} ({', '.join(history)})" for problem in problems]
        if not was_killed:
            break
    shutil.rmtree(job.folder, ignore_errors=True)


def _run(job: Job, counter: Path, kill: Kill | None, groups: set[int]) -> CompletedProcess:
    fork = _start(job, counter, disturbed=True, kill=kill)
    groups.add(fork.process.pid)
    if kill is not None and kill.seconds is not None:
        fork.process.join(kill.seconds)
        if fork.process.is_alive():
            kill.send(fork.process.pid)
    return fork.wait()


def _end(job: Job, done: CompletedProcess, whole: Path, outcome: Outcome) -> list[str]:
    """What is wrong with a job that has ended by itself."""
    missing = [f"missing: {name}" for name in sorted(outputs.missing(job, whole))]
    differences = outputs.differences(job.folder, whole, outputs.files(job.folder))
    left_over = [f"left over: {name}" for name in sorted(outputs.left_over(job, whole))]
    # A job that was killed after its last file: the same command says that its result is there.
    survived = done.returncode == 0 or (done.returncode == 2 and "already" in done.stderr and not missing)
    outcome.survived += survived
    outcome.equal += not missing and not differences
    outcome.clean += not left_over
    if not survived:
        return [f"code {done.returncode}, {(done.stderr.splitlines() or [''])[-1]}"]
    return missing + differences + left_over


def end_orphans(groups: set[int], seconds: float) -> int:
    """Wait so long for the helpers of killed processes to end by themselves; end those that do not, and count them."""
    deadline = time.monotonic() + seconds
    while (alive := _members(groups)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(alive)


def _members(groups: set[int]) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) in groups and state != "Z":
                found.append(int(stat.parent.name))
    return found


def _moment(number: int, whole: Undisturbed, draw: random.Random) -> Kill:
    """Half of them by the clock, half between two looks at files, which is where writing can go wrong."""
    to_group = draw.random() < 0.5
    if draw.random() < 0.5:
        return Kill(number, to_group, seconds=draw.uniform(0, whole.seconds))
    return Kill(number, to_group, look=draw.randint(1, whole.looks))


def _start(job: Job, counter: Path, *, disturbed: bool, kill: Kill | None = None) -> Fork:
    return Fork(*job.command(disturbed=disturbed), before=partial(_prepare, job.folder, counter, kill))


def _prepare(folder: Path, counter: Path, kill: Kill | None) -> None:
    """In the process, before the script: a group of its own, quick samples, and a kill before a look at a file.

    Every look at something below `folder` is a byte of the file `counter`. cache_latents.py marks rows after each batch
    and not after 20 seconds, so that a job of seconds has something to go on from.
    """
    os.setpgid(0, 0)
    few_sampling_steps().__enter__()
    evaluation.online.BATCH_SIZE = 8
    write = LatentCache.write

    def write_and_flush(cache, first, mean_std):
        write(cache, first, mean_std)
        cache.flush()

    LatentCache.write = write_and_flush

    main, looks = os.getpid(), os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in LOOKS and str(args[0]).startswith(str(folder)) and os.getpid() == main:
            count += 1
            os.write(looks, b".")
            if kill is not None and count == kill.look:
                kill.send(main)

    sys.addaudithook(hook)
