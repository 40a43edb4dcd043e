"""The path, its derivatives, the score, and the drawn times."""

import pytest
import torch

from models.interpolant import coefficients, interpolate, score_from_velocity, time_from_draw
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
