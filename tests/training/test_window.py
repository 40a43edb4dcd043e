"""A row: means over what was finite, skipped steps, and the bad steps at its end, also beyond its beginning."""

import math

import pytest
import torch

from training.window import Window

INF, NAN = math.inf, math.nan


def row_of(window: Window, steps: dict[int, dict[str, float]]) -> dict:
    for step, scalars in steps.items():
        window.start_step()
        window.add(step, {name: torch.tensor(value) for name, value in scalars.items()})
    return window.close(images_per_step=1)


@pytest.fixture
def window():
    return Window(torch.device("cpu"))


def test_a_mean_is_over_the_steps_that_had_a_finite_value(window):
    rows = {1: dict(a=1.0, b=NAN), 2: dict(a=INF, b=-INF), 3: dict(a=3.0, b=NAN), 4: dict(a=5.0)}
    row = row_of(window, rows)
    assert row["a"] == 3 and row["b"] is None
    row = row_of(window, {5: dict(a=7.0, b=1.0)})
    assert row["a"] == 7 and row["b"] == 1


def test_steps_without_a_finite_norm_are_counted_for_each_network(window):
    sit, vae = {1: INF, 2: NAN, 3: 2.0, 4: INF}, {1: 1.0, 3: 1.0}
    steps = {step: {"grad_norm_sit": norm} for step, norm in sit.items()}
    for step, norm in vae.items():
        steps[step]["grad_norm_vae"] = norm
    row = row_of(window, steps)
    assert row["skipped_steps_sit"] == 3 and row["skipped_steps_vae"] == 0 and row["grad_norm_sit"] == 2
    row = row_of(window, {5: dict(grad_norm_sit=1.0)})
    assert row["skipped_steps_sit"] == 0 and "skipped_steps_vae" not in row


def test_bad_steps_in_a_row_are_followed_from_row_to_row(window):
    """Each network by the steps at which it learns: every second one here."""
    norms = {"sit": [1.0, INF, INF, 1.0, NAN, NAN, INF, 1.0], "vae": [NAN, None, INF, None, INF, None, 1.0, None]}
    found = []
    for first, last in ((0, 2), (2, 5), (5, 7), (7, 8)):
        steps = {
            step + 1: {f"grad_norm_{name}": norm[step] for name, norm in norms.items() if norm[step] is not None}
            for step in range(first, last)
        }
        row_of(window, steps)
        found.append(window.bad_steps)
    assert [bad["sit"] for bad in found] == [[2], [5], [5, 6, 7], []]
    assert [bad["vae"] for bad in found] == [[1], [1, 3, 5], [], []]


def test_a_window_that_goes_on_is_one_that_was_never_left(window):
    """Also for a network that has not learned since."""
    before = {1: dict(grad_norm_sit=1.0, grad_norm_vae=INF), 2: dict(grad_norm_sit=NAN)}
    after = {3: dict(grad_norm_sit=5.0)}
    row_of(window, before)  # closed
    for step, scalars in before.items():
        window.add(step, {name: torch.tensor(value) for name, value in scalars.items()})
    resumed = Window(torch.device("cpu"))
    resumed.load_state(window.state())
    rows = [row_of(one, after) for one in (window, resumed)]
    for row in rows:
        assert (row["grad_norm_sit"], row["skipped_steps_sit"], row["skipped_steps_vae"]) == (3, 1, 1)
    assert list(rows[0]) == list(rows[1])


def test_of_the_last_step_the_losses_that_are_not_finite_are_known(window):
    row_of(window, {1: dict(sit_loss=NAN, d_loss=1.0), 2: dict(sit_loss=1.0, d_loss=-INF, logits_real=NAN)})
    assert window.infinite_losses() == ["d_loss"]
    assert window.last["sit_loss"] == 1 and math.isnan(window.last["logits_real"])
    row_of(window, {3: dict(sit_loss=1.0, grad_norm_sit=INF)})
    assert window.infinite_losses() == []
