"""Two processes of which one is asked to stop, fails or is gone: both end, soon, and the lines say which and why."""

import os
import signal
import time

import psutil
import pytest

from tests.support import small
from tests.support.forks import two_processes
from utils.errors import REQUEUE

PLAIN = dict(enc_type="None", proj_coeff=0, max_train_steps=6, checkpointing_steps=6)
PATIENCE = 60  # seconds


def with_fault(fault: str, place, output, **options):
    """The ends of both processes of a run, the second of which meets a fault in its third step; and what is left."""
    argv = small.ldm_options(place, output, "run", **PLAIN | options)
    jobs = two_processes("tests/support/workers/faulty.py", fault, 1, 2, "train_ldm_only", *argv)
    deadline = time.monotonic() + PATIENCE
    ends = [job.wait(deadline - time.monotonic()) for job in jobs]
    groups = {job.process.pid for job in jobs}
    while left := of_groups(groups):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return ends


def of_groups(groups: set[int]) -> list[psutil.Process]:
    """The living processes of these groups."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) in groups:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
    return found


def lines(end) -> list[str]:
    """What a process says beside its log and its progress."""
    return [line for line in end.stderr.splitlines() if "faulty.py" in line and " commit " not in line]


@pytest.mark.parametrize(
    ("fault", "options", "cause", "step"),
    [
        ("group SIGTERM", dict(num_workers=2), "a signal to another process", 4),  # as a scheduler does, or a terminal
        ("SIGUSR1", dict(), "a signal to another process", 4),
        ("SIGCONT", dict(max_hours=1e-6), "--max-hours 1e-06", 2),  # SIGCONT does nothing
    ],
)
def test_both_stop_after_the_same_step_with_one_checkpoint(fault, options, cause, step, place, tmp_path):
    first, second = with_fault(fault, place, tmp_path, **options)
    assert first.returncode == second.returncode == REQUEUE
    said = f"faulty.py: stopped: by {cause}, after step {step}; --resume latest goes on from its checkpoint, of step {step}"
    assert lines(first) == [said] and lines(second) == []
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{step:07d}.pt"]


def test_a_run_that_one_process_stopped_goes_on_as_if_undisturbed(place, tmp_path):
    with_fault("SIGTERM", place, tmp_path)
    for name in ("run", "whole"):
        argv = small.ldm_options(place, tmp_path, name, resume="latest", **PLAIN)
        assert [job.wait().returncode for job in two_processes("train_ldm_only.py", *argv)] == [0, 0]
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"), 6)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("SIGKILL", -signal.SIGKILL, None),
        ("InputError", 2, "faulty.py [rank 1]: error: a fault for a test"),
        ("loader SIGKILL", 1, "faulty.py [rank 1]: stopped: a loader process is gone, perhaps for want of memory; "),
    ],
)
def test_a_process_that_is_lost_ends_the_other(fault, code, said, place, tmp_path):
    """Its loader processes too."""
    first, second = with_fault(fault, place, tmp_path, num_workers=1)
    assert (first.returncode, second.returncode) == (1, code)
    (line,) = lines(first)
    assert line.startswith("faulty.py: stopped: rank 0 has lost another process, which says why if it could (")
    assert [line[: len(said)] for line in lines(second)] == [said] if said else lines(second) == []
    assert "Traceback" not in first.stderr + second.stderr


def test_a_fault_of_ours_keeps_its_traceback_where_it_is(place, tmp_path):
    first, second = with_fault("TypeError", place, tmp_path, num_workers=1)
    assert first.returncode == second.returncode == 1
    assert len(lines(first)) == 1 and "Traceback" not in first.stderr
    assert "TypeError: a fault for a test" in second.stderr and "Traceback" in second.stderr
