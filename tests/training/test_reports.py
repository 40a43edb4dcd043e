"""A run's reports on a disk that is full: rows wait for room, in order; a picture is lost; training goes on."""

import errno
import json
import resource
from argparse import Namespace

import numpy as np
import pytest

from training.reports import Reports, finite


@pytest.fixture
def reports(tmp_path):
    reports = Reports(Namespace(report_to="none"), tmp_path, start_step=0)
    yield reports
    reports.close()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_wait_for_room(reports, tmp_path, monkeypatch, caplog):
    reports.row("metrics.jsonl", 1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("training.reports._append", full)
        for step in (2, 3):
            reports.row("metrics.jsonl", step, {"loss": float(step)})
    reports.row("metrics.jsonl", 4, {"loss": 4.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "loss": step} for step in (1, 2, 3, 4)]
    assert "step 2: its row of metrics.jsonl waits (No space left on device); training goes on" in caplog.text


def test_half_a_line_does_not_stay(reports, tmp_path, caplog):
    """As where the last block of a disk takes the beginning: here no file may grow beyond a few bytes more."""
    reports.row("metrics.jsonl", 1, {"loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        reports.row("metrics.jsonl", 2, {"loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reports.row("metrics.jsonl", 3, {"loss": 3.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and "File too large" in caplog.text


class BadTracker:
    def log(self, *_, **__):
        raise RuntimeError("the server is gone")

    log_images = log

    def finish(self):
        raise RuntimeError("the server is gone")


def test_a_tracker_that_fails_costs_no_training(reports, tmp_path, caplog):
    reports.trackers = [BadTracker()]
    reports.row("metrics.jsonl", 1, {"loss": 1.0})
    reports.pictures(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
    reports.close()
    assert caplog.text.count("the server is gone") == 3 and (tmp_path / "samples" / "0000001-samples.png").is_file()
    reports.trackers = []


def test_a_picture_is_lost_and_said(reports, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("training.reports.save_png", full)
    reports.pictures(3, {"samples": np.zeros((2, 2, 3), np.uint8)})
    assert "step 3: the picture of samples is lost (No space left on device); training goes on" in caplog.text


def test_a_row_is_json(reports, tmp_path):
    reports.row("metrics.jsonl", 1, {"a": float("nan"), "b": float("inf"), "c": None, "d": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}
    assert finite({"a": float("inf"), "d": 0.5}) == {"d": 0.5}
