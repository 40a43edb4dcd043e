"""A run whose numbers have gone bad ends, says why, and leaves what is needed to go on and to find out."""

import json
import math

import pytest
import torch

import train_ldm_only
from dataset.data import LatentsAndLabels
from tests.gpu.steps import around_steps, train
from tests.support import small

# Rows and checkpoints after every second step, of two micro-steps.
OPTIONS = dict(max_train_steps=8, log_steps=2, gradient_accumulation_steps=2, enc_type="None", proj_coeff=0)


def plant(monkeypatch, bad: float, *, at) -> None:
    """Gradients of SiT become `bad` at these steps, counted from 0."""

    def around(step, call, nets, optimizer):
        handle = optimizer.parameters[-1].register_hook(lambda grad: grad * bad) if step in at else None
        logs = call()
        if handle:
            handle.remove()
        return logs

    around_steps(monkeypatch, "train_ldm_only", around)


@pytest.fixture
def stopped(capsys):
    """`stopped(place, output, **options)`: the line with which a run of `train_ldm_only.py` ends with exit code 1."""

    def run(place, output, **options) -> str:
        with pytest.raises(SystemExit) as leaving:
            train("train_ldm_only", place, output, "run", **options)
        assert leaving.value.code == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "stopped" in line)
        return line

    return run


def test_bad_steps_in_a_row_end_a_run_which_goes_on_from_its_last_checkpoint(place, tmp_path, stopped, monkeypatch):
    read, seen = LatentsAndLabels.__getitems__, []
    monkeypatch.setattr(LatentsAndLabels, "__getitems__", lambda data, at: seen.append(at) or read(data, at))
    with monkeypatch.context() as patch:
        plant(patch, math.nan, at=range(3, 8))
        line = stopped(place, tmp_path, max_bad_steps=2, **OPTIONS)
    # Steps 4, 5 and 6 are bad: at the row of step 4 one is not enough, at that of step 6 they are three.
    why = "the gradient norm of sit was not finite in 3 steps in a row, since step 4"
    path = tmp_path / "run" / "bad-step-0000006.json"
    what = "the last good checkpoint is that of step 4; to try: lower learning rates, in a fresh run --qk-norm"
    assert line.endswith(f"stopped: step 6: {why}; {what}; see {path}")
    assert [row["skipped_steps_sit"] for row in small.metrics(tmp_path, "run")] == [0, 1, 2]

    record = json.loads(path.read_text(), parse_constant=lambda _: 1 / 0)
    assert record["step"] == 6 and record["why"] == why and record["bad_steps"] == {"sit": [4, 5, 6]}
    assert record["scalars"]["grad_norm_sit"] is None and record["not_finite"] == {"grad_norm_sit": "NaN"}
    assert math.isfinite(record["scalars"]["sit_loss"]) and record["loss_scales"] == {}
    assert record["draws"] == {"seed": 0, "step": 5, "micro_steps": [0, 1]}
    assert record["images"] == seen[10:12]

    # Without the plant it goes on as a run in which step 4 alone was bad.
    train("train_ldm_only", place, tmp_path, "run", resume="latest", **OPTIONS)
    plant(monkeypatch, math.nan, at=[3])
    train("train_ldm_only", place, tmp_path, "other", **OPTIONS)
    actual, expected = small.checkpoint(tmp_path, "run", 8), small.checkpoint(tmp_path, "other", 8)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)
    assert small.metrics(tmp_path, "run") == small.metrics(tmp_path, "other")

    train("train_ldm_only", place, tmp_path, "run", overwrite=True, **OPTIONS | dict(max_train_steps=1))
    assert not path.exists()


def test_a_loss_scale_below_one_ends_a_run(place, tmp_path, stopped, monkeypatch):
    """From 2 two overflows lead to 0.5."""
    build = train_ldm_only.build_optimizer

    def with_a_low_scale(*args):
        optimizer = build(*args)
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        return optimizer

    monkeypatch.setattr(train_ldm_only, "build_optimizer", with_a_low_scale)
    plant(monkeypatch, math.inf, at=[2, 3])
    line = stopped(place, tmp_path, mixed_precision="fp16", **OPTIONS | dict(gradient_accumulation_steps=1))
    why = "step 4: the loss scale of sit has fallen to 0.5, its gradients not finite since step 3"
    assert f"stopped: {why}; the last good checkpoint is that of step 2; to try: --mixed-precision bf16 or no" in line
    record = json.loads((tmp_path / "run" / "bad-step-0000004.json").read_text())
    assert record["loss_scales"] == {"sit": 0.5} and record["not_finite"] == {"grad_norm_sit": "+Inf"}


def test_an_overflow_hinders_no_checkpoint(place, tmp_path, monkeypatch):
    """Finite losses, infinite gradients, at the very step of the checkpoint and of the end."""
    plant(monkeypatch, math.inf, at=[1])
    how = OPTIONS | dict(max_train_steps=2, gradient_accumulation_steps=1)
    train("train_ldm_only", place, tmp_path, "run", mixed_precision="fp16", **how)
    (row,) = small.metrics(tmp_path, "run")
    assert row["skipped_steps_sit"] == 1 and row["loss_scale_sit"] == 2**15
    assert (tmp_path / "run" / "checkpoints" / "0000002.pt").is_file()
