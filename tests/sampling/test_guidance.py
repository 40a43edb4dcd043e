"""Guidance as the one function that all samplers share, against the public codes of its kinds."""

import itertools

import numpy as np
import pytest
import torch

from sampling.samplers import guided_velocity
from tests.support.golden_data import close, load

ARRAYS, META = load("options/guidance")
LDIT, _ = load("options/ldit_sampler")
REL, ABS = 1e-5, 1e-7


def constant(values):
    """A velocity that does not look at its input."""
    return lambda x_t, t, labels: torch.as_tensor(values)


def of_row(i: int, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(ARRAYS[f"in.{name}"][i : i + 1]) for name in names]


@pytest.mark.parametrize("case", ["cfg", "autoguidance"])
def test_both_ends_of_the_interval_are_guided(case):
    """diffusion-bench's guidance by the null label, and RAE's by a weaker network; a row has a time of its own."""
    weaker_name = {"cfg": "full_unconditional", "autoguidance": "base_conditional"}[case]
    scale, interval = META["cases"][case]["scale"], META["cases"][case]["interval"]
    for i, t in enumerate(ARRAYS["in.t"].tolist()):
        v, weaker = of_row(i, "full_conditional", weaker_name)
        pair = constant(torch.cat([v, weaker] if interval[0] <= t <= interval[1] else [v]))
        how = (pair, None) if case == "cfg" else (constant(v), constant(weaker))
        labels = torch.zeros(1, dtype=torch.int64)
        guided = guided_velocity(how[0], labels, scale, interval, null_label=1, guide=how[1])
        close(guided(torch.zeros_like(v).double(), t, t), ARRAYS[f"{case}.out"][i : i + 1], REL, ABS, (case, t))


@pytest.mark.parametrize("t", ["0.1", "0.2499", "0.25", "0.9"])
def test_lightningdit_guides_its_first_channels_alone(t):
    """Its time and velocity are ours turned, and its interval has one end, the start 0.25."""
    model_out = torch.from_numpy(LDIT["cfg.model_out"])  # given labels, then the null label
    v = -model_out[:2] if float(t) < 0.25 else -model_out
    guided = guided_velocity(constant(v), torch.zeros(2, dtype=torch.int64), 4.0, (0, 1 - 0.25), 1, channels=3)
    ours = 1 - float(t)
    out = -guided(torch.zeros(2, *v.shape[1:], dtype=torch.float64), ours, ours)
    close(out, LDIT[f"cfg.t{t}.scale4.0.start0.25.out"][:2], REL, ABS)


def test_velocities_are_guided_as_denoised_images_are():
    x_t, t, main, weak = (torch.from_numpy(ARRAYS[f"vel.{x}"]) for x in ("x_t", "t", "velocity_main", "velocity_guide"))
    scale = META["cases"]["vel"]["guidance"]
    guided = guided_velocity(constant(main), torch.zeros(3, dtype=torch.int64), scale, (0, 1), guide=constant(weak))
    close(x_t - t * guided(x_t.double(), 0.5, 0.5), ARRAYS["vel.denoised"], REL, ABS)


@pytest.mark.parametrize("case", [case for case in META["cases"] if case.startswith("edm2.")])
def test_autoguidance_is_that_of_edm2(case):
    """EDM2's Heun sampler on Gaussian denoisers, which are guided as velocities are."""
    settings, calls = META["cases"][case], []
    mu = torch.from_numpy(ARRAYS["edm2.mu"])

    def denoiser(name: str, s: float):
        def denoise(x, sigma, labels):
            calls.append([name, sigma[0].item()])
            variance = sigma.view(-1, 1, 1, 1) ** 2
            return mu + (x - mu) * s**2 / (s**2 + variance)

        return denoise

    main, guide = (denoiser(name, settings[f"s_{name}"]) for name in ("main", "guide"))
    denoise = guided_velocity(main, torch.zeros(2, dtype=torch.int64), settings["guidance"], (0, 100), guide=guide)
    rho, n = settings["rho"], settings["num_steps"]
    high, low = (settings[f"sigma_{end}"] ** (1 / rho) for end in ("max", "min"))
    sigmas = [*((high + np.arange(n) / (n - 1) * (low - high)) ** rho).tolist(), 0.0]
    x = torch.from_numpy(ARRAYS["edm2.noise"]).double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma, 0.5)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + (euler - denoise(euler, sigma_next, 0.5)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
    close(x, ARRAYS[f"{case}.out"], REL, ABS)
    assert [name for name, _ in calls] == [name for name, _ in settings["calls"]]
    assert [sigma for _, sigma in calls] == pytest.approx([sigma for _, sigma in settings["calls"]], rel=1e-5)


def test_a_guide_needs_no_null_label_and_rests_outside_the_interval():
    labels, calls, x = torch.zeros(1, dtype=torch.int64), [], torch.zeros(1, 2, 1, 1, dtype=torch.float64)

    def guide(x_t, t, y):
        calls.append((len(x_t), t.item()))
        return torch.zeros_like(x_t)

    guided = guided_velocity(lambda x_t, t, y: torch.ones_like(x_t), labels, 3.0, (0.2, 0.6), None, 1, guide)
    assert guided(x, 0.5, 0.5).flatten().tolist() == [3, 1]  # the first channel alone
    assert guided(x, 0.7, 0.7).flatten().tolist() == [1, 1]
    assert calls == [(1, 0.5)]
