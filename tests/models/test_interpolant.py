"""The path, its derivatives, the score, and the drawn times."""

import math

import pytest
import torch

from configs.parsing import weighting
from models.interpolant import (
    Noising,
    coefficients,
    interpolate,
    resolve_time_shift,
    score_from_velocity,
    shift_time,
    time_from_draw,
    time_shift_notes,
)
from tests.support.golden_data import close, load

PATHS = ["linear", "cosine"]


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_the_coefficients(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        (oracle,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(oracle, derivative)


@pytest.mark.parametrize("path", PATHS)
def test_path_starts_at_data_and_ends_at_noise(path):
    x_0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for time, end in ((0.0, x_0), (1.0, noise)):
        x_t, _ = interpolate(x_0, noise, torch.full((2,), time, dtype=torch.float64), path)
        torch.testing.assert_close(x_t, end)


@pytest.mark.parametrize("path", PATHS)
def test_the_score_of_a_gaussian_is_the_known_one(path):
    """Data N(m, s^2) make x_t Gaussian: its score is known, and so is its conditional velocity."""
    m, s, t = 0.7, 0.4, torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    x = torch.randn(7, dtype=torch.float64)
    variance = alpha**2 * s**2 + sigma**2
    score = -(x - alpha * m) / variance
    x_0, noise = m + alpha * s**2 * -score, sigma * -score  # posterior means given x_t
    torch.testing.assert_close(score_from_velocity(d_alpha * x_0 + d_sigma * noise, x, t, path), score)


def test_the_score_is_that_of_the_public_code():
    arrays, _ = load("samplers")
    v, x, t = (torch.from_numpy(arrays[f"score.{key}"]) for key in "vxt")
    for path in PATHS:
        close(score_from_velocity(v, x, t.view(-1, 1, 1, 1), path), arrays[f"score.{path}"], 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_a_lognormal_noise_to_signal_ratio(path):
    draw = torch.randn(1000, dtype=torch.float64)
    t = time_from_draw(draw, "lognormal", path)
    alpha, sigma, *_ = coefficients(t, path)
    torch.testing.assert_close((sigma / alpha).log(), draw)
    assert t.min() > 0 and t.max() < 1
    assert time_from_draw(torch.zeros(1), "lognormal", path).item() == pytest.approx(0.5, abs=1e-7)


TABLES = 5e-7  # tables and time grids: absolute


def test_logit_normal_times_are_those_of_lightningdit():
    """Its time is 1 - ours, so its draw is minus ours; what 1 - s loses near 1 is beyond the table's own precision."""
    assert weighting("logit-normal") == weighting("lognormal") == "lognormal"
    arrays, meta = load("options/ldit_loss")
    raw = torch.from_numpy(arrays["logit_normal.raw"])
    close(time_from_draw(-raw, "lognormal", "linear"), arrays["logit_normal.ours.t"], 0, 1e-7)
    close(time_from_draw(raw, "lognormal", "linear"), arrays["logit_normal.t"], 0, 1e-7)
    for variant, settings in meta["variants"].items():
        raw = torch.from_numpy(arrays[f"{variant}.raw_time_draw"])
        kind = "lognormal" if settings["use_lognorm"] else "uniform"
        close(time_from_draw(raw, kind, "linear"), arrays[f"{variant}.t"], 0, TABLES)


def test_shifted_times_are_those_of_the_public_codes():
    arrays, meta = load("options/timeshift")
    times = torch.from_numpy(arrays["in.t"])
    shift_of = {case["name"]: case["shift"] for case in meta["shifts"]}
    for name, shift in shift_of.items():
        close(shift_time(times, shift), arrays[f"{name}.shifted"], 0, TABLES, name)
    for case in meta["shifts"]:
        if case["base"] == 4096:
            assert resolve_time_shift("auto", (case["dim"] // 4, 2, 2)) == pytest.approx(case["shift"], rel=1e-12)
    for case in meta["grids"]:
        steps = case["num_steps"]
        rae = case["name"].startswith("rae.")
        even = 1 - torch.linspace(0, 0.999, steps) if rae else torch.linspace(1, 0, steps + 1)
        close(shift_time(even, case["shift"]), arrays[case["name"]], 0, TABLES, case["name"])


def test_a_shift_of_one_changes_no_bit_and_no_shift_moves_the_ends():
    for dtype in (torch.float32, torch.float64):
        t = torch.cat([torch.rand(20000, dtype=dtype), torch.rand(2000, dtype=dtype) ** 20])
        assert torch.equal(shift_time(t, 1.0), t)
    for shift in (0.3, 1.414, 6.9):
        assert shift_time(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]


def test_shifted_training_times_are_those_of_the_public_codes():
    arrays, meta = load("options/timeshift")
    for case in meta["training"]:
        raw = torch.from_numpy(arrays[case["raw"]])
        if case["raw"] == "in.raw_normal":
            draw = case["mu"] + case["sigma"] * raw
        else:  # RAE's normal, cut off where its sigmoid passes 0.999
            draw = torch.special.ndtri(raw.double() * torch.special.ndtr(torch.tensor(0.999).double().logit()))
        t = shift_time(time_from_draw(draw, "lognormal", "linear"), case["shift"])
        close(t, arrays[case["name"]], 0, TABLES, case["name"])


def test_the_path_of_diffusion_bench_is_ours_and_its_target_shrinks_at_small_times():
    arrays, _ = load("options/timeshift")
    t, data, noise, pred = (
        torch.from_numpy(arrays[key]) for key in ("in.t", *(f"dbench.{x}" for x in ("data", "noise", "pred")))
    )
    x_t, target = interpolate(data, noise, t, "linear")
    close(x_t, arrays["dbench.x_t"], 1e-5, 1e-7)
    shrunk = target * (t / 0.05).clamp(max=1).view(-1, 1, 1, 1)
    close(shrunk, arrays["dbench.target"], 1e-5, 1e-7)
    close((pred - shrunk).square(), arrays["dbench.loss"], 1e-5, 1e-7)


def test_times_of_training_are_shifted_after_they_are_drawn():
    class Draws:
        def normal(self, purpose, *shape):
            return torch.linspace(-2, 2, 5)

        uniform = normal

    shape = (32, 16, 16)
    plain, shifted = (
        Noising(weighting="lognormal", time_shift=shift).draw(Draws(), shape)[2] for shift in (1.0, "auto")
    )
    assert torch.equal(plain, time_from_draw(torch.linspace(-2, 2, 5), "lognormal", "linear"))
    torch.testing.assert_close(
        shifted.logit() - plain.logit(), torch.full((5,), 0.5 * math.log(2))
    )  # a shift of logits
    assert time_shift_notes("auto", shape) == ["--time-shift auto: 1.414, by latents of 32 x 16 x 16"]
    assert time_shift_notes(1.0, shape) == []
