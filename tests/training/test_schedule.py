"""Learning rates at each step, against the public code and by their definition."""

import argparse
import itertools
import json

import pytest
import torch
from torch import nn

from tests.support.golden_data import GOLDEN
from tests.support.refusals import refusal
from training.optimizer import Optimizer, set_learning_rates
from training.schedule import Schedule, learning_rate_schedule

CASES = json.loads((GOLDEN / "options" / "lr_schedule.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rates_are_those_of_the_public_code(case):
    config, warmup, end = case["config"], case["warmup_steps"], case["decay_end_steps"]
    base, final = config["base_lr"], config["final_lr"] / config["base_lr"]
    schedule = Schedule(config["type"], warmup if config["warmup_from_zero"] else 0, warmup, end, final)
    assert [base * schedule(step) for step in case["steps"]] == pytest.approx(case["lr"], rel=1e-12)
    updates = [base * schedule(step) for step in range(12)]
    assert updates == pytest.approx(case["lr_of_updates_0_to_11"], rel=1e-12)


def flags(**given) -> argparse.Namespace:
    usual = dict(warmup_steps=0, lr_schedule="constant", lr_final=0.0, lr_decay_start=None, epochs=None)
    return argparse.Namespace(**usual | dict(max_train_steps=10) | given)


def test_flags_make_a_schedule():
    assert not learning_rate_schedule(flags()).moves
    rising = learning_rate_schedule(flags(warmup_steps=4))
    assert [rising(step) for step in (0, 1, 3, 4, 1000)] == [0.25, 0.5, 1, 1, 1]
    falling = learning_rate_schedule(flags(warmup_steps=2, lr_schedule="linear", lr_final=0.5, lr_decay_start=6))
    assert [falling(step) for step in (0, 1, 6, 8, 10)] == [0.5, 1, 1, 0.75, 0.5]
    cosine = learning_rate_schedule(flags(lr_schedule="cosine"))
    assert all(a > b for a, b in itertools.pairwise(map(cosine, range(11)))) and cosine(5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(lr_final=0.1), "--lr-final goes with --lr-schedule linear or cosine"),
        (dict(lr_decay_start=3), "--lr-decay-start goes with --lr-schedule linear or cosine"),
        (dict(lr_schedule="cosine", epochs=3), "--epochs: 3 was given"),
        (dict(lr_schedule="cosine", warmup_steps=10), "--warmup-steps: 10 was given"),
        (dict(lr_schedule="linear", warmup_steps=5, lr_decay_start=4), "--lr-decay-start: 4 was given"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, said):
    assert said in refusal(learning_rate_schedule, flags(**given))


def test_every_optimiser_steps_with_its_share_and_the_log_has_the_first_ones_rate():
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    schedule = Schedule("linear", 2, 2, 4, 0.5)
    common = dict(betas=(0.0, 0.0), eps=1e-12, weight_decay=0, max_grad_norm=1e9, scale_loss=False)
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    named = [[("p", parameter)] for parameter in parameters]
    optimizers = [Optimizer(p, lr=lr, schedule=schedule, **common) for p, lr in zip(named, (0.1, 0.3), strict=True)]
    for step, share in enumerate((0.5, 1, 1, 0.75, 0.5)):
        before = [parameter.item() for parameter in parameters]
        assert set_learning_rates(optimizers, step)["lr"].item() == pytest.approx(0.1 * share)
        for optimizer, parameter in zip(optimizers, parameters, strict=True):
            optimizer.backward(parameter.sum())
            optimizer.step()
        moved = [was - parameter.item() for was, parameter in zip(before, parameters, strict=True)]
        assert moved == pytest.approx([0.1 * share, 0.3 * share])
    fixed = Optimizer(named[0], lr=0.1, **common)
    assert set_learning_rates([fixed], 3) == {}
