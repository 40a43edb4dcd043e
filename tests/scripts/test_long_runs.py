"""Thousands of steps: memory, open files and threads stay what they were after the first 200."""

import os
from pathlib import Path

import pytest

import train_ldm_only
from tests.support import small
from training.run import Run

EVERY = 200  # steps between two checkpoints, evaluations and pictures


def in_use() -> dict[str, int]:
    """Of this process now: resident bytes, open files, threads."""
    process = Path("/proc/self")
    rss = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"rss": rss} | {name: len(list((process / name).iterdir())) for name in ("fd", "task")}


@pytest.mark.slow
def test_nothing_grows(place, tmp_path, few_steps, monkeypatch):
    found, log = [], Run.log

    def log_and_look(run, step, scalars):
        log(run, step, scalars)
        if step % EVERY == EVERY // 2:  # away from the checkpoints, whose copies come and go
            found.append(in_use())

    monkeypatch.setattr(Run, "log", log_and_look)
    options = dict(max_train_steps=2000, checkpointing_steps=EVERY, checkpoints_total_limit=2, log_steps=10)
    options |= dict(num_workers=2, num_preview=2, sampling_steps=EVERY, batch_size=4)
    options |= dict(eval_steps=EVERY, eval_reference=place.data, eval_features=place.encoder, eval_samples=8)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **options))
    _, first, *later = found
    assert len(later) == 8
    assert {(row["fd"], row["task"]) for row in later} == {(first["fd"], first["task"])}
    assert max(row["rss"] for row in later) < first["rss"] + 2**24  # 6 MB were measured
