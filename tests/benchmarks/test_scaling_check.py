"""The check of the scaling model: its worker measures every kind of step, and its rows are the formula's."""

import argparse
import json
import os
import socket

import pytest

from benchmarks import scaling_check
from benchmarks.scaling import BUCKET


@pytest.fixture
def one_process(monkeypatch):
    """A process group of this process alone, for whoever starts one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (place | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *where: None)  # this process stays where it was


def test_the_worker_measures_steps_of_every_kind(one_process, tmp_path):
    args = argparse.Namespace(model="SiT-T/8", batch_size=1, rounds=2, worker=tmp_path / "measured.json")
    scaling_check.work(args)
    measured = json.loads(args.worker.read_text())
    assert sum(measured["buckets"]) == measured["gradient_bytes"] > 0
    kinds = {"one process", "two, not averaged", "two, gloo", "two, fast link", "two, slow link"}
    assert set(measured["median"]) == kinds | {"backward", "a number", "a bucket"}
    assert all(seconds > 0 for seconds in measured["median"].values())


def test_rows_are_what_the_formula_says_of_the_medians():
    steps = {"one process": 0.9, "two, not averaged": 1.0, "two, gloo": 1.6, "two, fast link": 1.1}
    median = steps | {"backward": 0.5, "a number": 0.01, "a bucket": 0.11}
    links = {"two, fast link": {"bandwidth": 10 * BUCKET, "latency": 0.0}}
    rows = scaling_check.rows_of({"median": median, "links": links, "gradient_bytes": 5 * BUCKET})
    assert [row["step"] for row in rows] == list(steps)
    gloo, fast = rows[2:]
    assert gloo["predicted_exposed_s"] == pytest.approx(5 * 0.11)  # nothing hides it
    assert fast["predicted_exposed_s"] == pytest.approx(0.1)  # the last bucket
    assert gloo["error"] == pytest.approx(1.55 / 1.6 - 1) and fast["error"] == pytest.approx(0)
