"""A run's own records, damaged: whole rows stay, the rest is left out with a line, and nothing else ends a job."""

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hostile import JSON, NESTED, broken, broken_json, outcome
from training import run_folder

ROWS = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
WHOLE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARGS = argparse.Namespace(seed=0, model="SiT-T/2", resume=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def rows_of(folder):
    return [json.loads(line) for line in (folder / run_folder.METRICS).read_text().splitlines()]


@given(st.lists(JSON.map(json.dumps) | st.sampled_from([*NESTED, "{", "\x00", "\u2028"]), max_size=3))
def test_rows_up_to_a_step_stay_whatever_lies_between_them(folder, others):
    lines = [json.dumps(row) for row in ROWS]
    (folder / run_folder.METRICS).write_text("\n".join([lines[0], *others, *lines[1:], '{"step": 1']))
    run_folder.make(folder, ARGS, 2)
    kept = rows_of(folder)
    assert kept[0] == ROWS[0] and kept[-1] == ROWS[1] and all(type(row["step"]) is int for row in kept)


@given(broken(WHOLE))
def test_broken_rows_are_left_out_aloud(folder, data):
    (folder / run_folder.METRICS).write_bytes(data)
    run_folder.make(folder, ARGS, 2)
    assert all(row["step"] <= 2 for row in rows_of(folder))


def test_what_is_left_out_is_counted(folder, caplog):
    (folder / run_folder.METRICS).write_bytes(b"\xff\n" + WHOLE + b"[1]\n")
    run_folder.make(folder, ARGS, 3)
    assert rows_of(folder) == ROWS and "metrics.jsonl: 2 damaged lines are left out" in caplog.text


@given(broken_json({"seed": 1, "model": "SiT-T/2"}))
def test_broken_options_of_an_earlier_run_are_one_line_or_compared(folder, text):
    (folder / "args.json").write_bytes(text)
    notes = outcome(run_folder.changed_flags, folder, ARGS, 2)
    assert notes is None or all(note.isprintable() for note in notes)
