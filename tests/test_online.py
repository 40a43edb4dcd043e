"""Evaluation in the middle of training: what it writes, and that the training does not notice it."""

import json

import numpy as np
import pytest
import torch

import train_ldm_only
import train_repae
from tests import small

SCRIPTS = {"repae": (train_repae, small.repae_options), "ldm": (train_ldm_only, small.ldm_options)}


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
        assert distance > 0 and all(0 <= value <= 1 for name, value in row.items() if not name.startswith("fd_"))
    assert rows[0] != rows[1]
    assert small.metrics(tmp_path, "with") == small.metrics(tmp_path, "without")
    states = [small.checkpoint(tmp_path, name, 4)["model"] for name in ("with", "without")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_is_missing_is_said_before_anything_is_written(place, tmp_path, capsys):
    for flags, needed in (({}, "--eval-reference"), (dict(eval_reference=tmp_path / "no"), "--eval-reference"),
                          (dict(eval_reference=place.data, eval_features="nonsense"), "--eval-features"),
                          (dict(eval_reference=place.data, eval_samples=3), "--eval-samples: 3 was")):  # fmt: skip
        usual = dict(eval_features=place.encoder)
        with pytest.raises(SystemExit) as stopped:
            train_repae.main(small.repae_options(place, tmp_path, "run", eval_steps=2, **usual | flags))
        assert stopped.value.code == 2 and not (tmp_path / "run").exists()
        error = capsys.readouterr().err.strip().splitlines()
        assert needed in error[-1]


def test_two_processes_refuse_with_one_line(place, tmp_path):
    """Once where rank 0 alone looks (no such file), once where all do (statistics of another space)."""
    stats = tmp_path / "stats.npz"
    meta = dict(format=1, features="inception", size=[24, 24], count=20, source="")
    np.savez(stats, mu=np.zeros(2048), sigma=np.eye(2048), meta=np.array(json.dumps(meta)))
    for reference, needed in ((tmp_path / "no", "does not exist"), (stats, "made in the space of inception")):
        flags = dict(eval_steps=2, eval_reference=reference, eval_features=place.encoder)
        done = small.run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_repae.py",
                                *small.repae_options(place, tmp_path, "run", **flags))  # fmt: skip
        lines = [line for line in done.stderr.splitlines() if ": error: " in line]
        assert done.returncode and len(lines) == 1 and needed in lines[0], done.stderr
        assert lines[0].startswith("train_repae.py: error: --eval-reference: ")
        assert not (tmp_path / "run").exists()
