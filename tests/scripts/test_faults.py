"""A small part of `make faults`: each script is killed once, started again, and has lost nothing."""

import signal

import pytest

from tests.faults.jobs import SCRIPTS, write_jobs
from tests.faults.kills import run_all, run_undisturbed
from tests.faults.outputs import is_known

SEED = 0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    return root, write_jobs(root, steps=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_once(script, jobs):
    root, job = jobs[0], jobs[1][script]
    outcome = run_all(job, signal.SIGKILL, run_undisturbed(job, root), kills=1, seed=SEED, patience=0)
    faults = [fault for fault in outcome.faults if "helper processes" not in fault]  # they are given no time to notice
    assert outcome.kills == outcome.restarts == 1
    assert not [fault for fault in faults if not is_known(fault)]
    assert faults or outcome.jobs == outcome.survived == outcome.equal == outcome.clean
