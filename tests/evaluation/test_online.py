"""Evaluation in the middle of training: what it writes, and that the training does not notice it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ldm_only
import train_repae
from evaluation.online import OnlineEvaluation
from tests.support import small

SCRIPTS = {"repae": (train_repae, small.repae_options), "ldm": (train_ldm_only, small.ldm_options)}


pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_curve_that_does_not_disturb_the_run(kind, place, tmp_path):
    script, options = SCRIPTS[kind]
    online = dict(eval_steps=2, eval_reference=place.data, eval_samples=10, eval_features=place.encoder)
    script.main(options(place, tmp_path, "with", **online))
    script.main(options(place, tmp_path, "without"))

    rows = [json.loads(line) for line in (tmp_path / "with" / "evaluations.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [2, 4]
    for row in rows:
        (distance,) = (value for name, value in row.items() if name.startswith("fd_"))
        assert distance > 0 and all(
            0 <= value <= 1 for name, value in row.items() if not name.startswith(("fd_", "kd_"))
        )
    assert rows[0] != rows[1]
    assert small.metrics(tmp_path, "with") == small.metrics(tmp_path, "without")
    states = [small.checkpoint(tmp_path, name, 4)["model"] for name in ("with", "without")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_the_reference_is_not_is_in_the_log(place, tmp_path):
    np.savez(tmp_path / "grey.npz", arr_0=np.load(place.data / "images.npy")[:, 0])
    online = dict(eval_steps=4, eval_reference=tmp_path / "grey.npz", eval_samples=10, eval_features=place.encoder)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **online))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"{tmp_path / 'grey.npz'}: grey images (20, 24, 24) are read as RGB") == 1


def test_an_evaluation_that_was_cut_off_is_made_up_for(place, tmp_path):
    """The checkpoint of step 4 is there, its evaluation is not: the job was killed within it."""
    online = dict(eval_steps=2, eval_reference=place.data, eval_samples=10, eval_features=place.encoder)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **online))
    file = tmp_path / "run" / "evaluations.jsonl"
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0])
    for _ in range(2):  # the second time there is nothing to make up for
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run", resume="latest", **online))
        assert file.read_text() == whole


def test_an_evaluation_does_not_count_as_training_time(place, tmp_path, monkeypatch):
    """By a clock that a step moves on by a second, and an evaluation by a thousand."""
    clock, step = [0.0], train_ldm_only.train_step

    def spend(seconds, result):
        clock[0] += seconds
        return result

    monkeypatch.setattr("training.window.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train_ldm_only, "train_step", lambda *args, **more: spend(1, step(*args, **more)))
    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *args: spend(1000, {"fd": 1.0}))
    online = dict(eval_steps=1, eval_reference=place.data, eval_samples=10, eval_features=place.encoder)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **online))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_per_second"] for row in rows] == [8, 8, 8, 8]


def test_what_is_missing_is_said_before_anything_is_written(place, tmp_path, capsys):
    for flags, needed in (
        ({}, "--eval-reference"),
        (dict(eval_reference=tmp_path / "no"), "--eval-reference"),
        (dict(eval_reference=place.data, eval_features="nonsense"), "--eval-features"),
        (dict(eval_reference=place.data, eval_samples=3), "--eval-samples: 3 was"),
        (dict(eval_reference=place.data, eval_steps=0), "it goes with --eval-steps"),
        (dict(eval_steps=0), f"--eval-features: {place.encoder} was given; it goes with --eval-steps"),
        (dict(eval_steps=0, eval_features="inception", eval_samples=9), "--eval-samples: 9 was given; it goes"),
    ):
        usual = dict(eval_features=place.encoder, eval_steps=2)
        with pytest.raises(SystemExit) as stopped:
            train_repae.main(small.repae_options(place, tmp_path, "run", **usual | flags))
        assert stopped.value.code == 2 and not (tmp_path / "run").exists()
        error = capsys.readouterr().err.strip().splitlines()
        assert needed in error[-1]
