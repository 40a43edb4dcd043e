"""Samplers against the public implementation, and against problems whose solution is known."""

import itertools
import math

import pytest
import torch

from models.sit import SiT
from sampling.samplers import euler, euler_maruyama, heun, ode_times, sde_times
from tests.support import golden_lightning
from tests.support.golden_data import close, filled, load

ARRAYS, META = load("samplers")
LDIT, OF_LDIT = load("options/ldit_sampler")


@pytest.fixture(scope="module")
def sit():
    model = SiT(**META["config"])
    model.load_state_dict(filled(load("sit_a")[1]["manifest"]), strict=False)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("run", META["runs"], ids=lambda run: run["name"])
def test_samples_and_calls_are_those_of_the_public_code(sit, run):
    calls = []

    def velocity(x_t, t, labels):
        assert x_t.dtype == t.dtype == torch.float32
        calls.append({"batch": len(x_t), "t": t[0].item()})
        return sit(x_t, t, labels)[0]

    noise, labels = torch.from_numpy(ARRAYS["in.latents"]), torch.from_numpy(ARRAYS["in.y"])
    interval = (run["guidance_low"], run["guidance_high"])
    settings = dict(num_steps=run["num_steps"], guidance_scale=run["cfg_scale"], guidance_interval=interval)
    settings |= dict(null_label=1000)
    if run["kind"] == "sde":
        steps = torch.from_numpy(ARRAYS[f"{run['name']}.noise"])
        settings |= dict(path_type=run["path_type"], step_noise=lambda i: steps[i])
    out = {"euler": euler, "heun": heun, "sde": euler_maruyama}[run["kind"]](velocity, noise, labels, **settings)
    assert out.dtype == torch.float64
    assert calls == run["network_calls"]
    close(out, ARRAYS[f"{run['name']}.out"], 1e-5)


def test_time_grids_are_those_of_the_public_code():
    for key in (k for k in ARRAYS if k.startswith("grid.")):
        _, kind, steps = key.split(".")
        grid = (ode_times if kind == "ode" else sde_times)(int(steps[1:]))
        close(grid, ARRAYS[key], 1e-7)


def test_shifted_time_grids_are_those_of_the_public_codes():
    """LightningDiT's time is 1 - ours and counts points, not evaluations: its shift 0.3 is our 1 / 0.3."""
    for case in OF_LDIT["grids"]:
        shift = case["timestep_shift"] or 1.0  # 0 is none
        grid = 1 - ode_times(case["num_sampling_steps"] - 1, 1 / shift)
        close(grid, LDIT[case["name"]], 0, 5e-7, case["name"])
    arrays, meta = load("options/timeshift")
    for case in meta["grids"]:
        if not case["name"].startswith("rae."):
            close(ode_times(case["num_steps"], case["shift"]), arrays[case["name"]], 0, 5e-7, case["name"])
    for tokens, steps in ((256, 4), (1024, 5), (4096, 8)):  # FLUX's shift: exp(mu), mu linear in the number of tokens
        mu = 0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5)
        close(ode_times(steps, math.exp(mu)), arrays[f"flux.seq{tokens}.steps{steps}"], 0, 5e-7)


@pytest.fixture(scope="module")
def ldit():
    return golden_lightning.build(OF_LDIT).eval().requires_grad_(False)


@pytest.mark.parametrize("run", OF_LDIT["runs"], ids=lambda run: run["name"])
def test_samples_are_those_of_lightningdit(ldit, run):
    """Shift, one-sided interval and guidance of three channels together. Its network sees the null label also where
    nothing is guided."""
    calls, null = [], OF_LDIT["config"]["num_classes"]

    def velocity(x_t, t, labels):
        calls.append((t[0].item(), len(labels) == 4))
        return -ldit(x_t, 1 - t, labels)[0]

    start, scale = run["cfg_interval_start"], run["cfg_scale"]
    settings = dict(num_steps=run["network_evaluations"], time_shift=1 / (run["timestep_shift"] or 1.0))
    settings |= dict(guidance_scale=scale, guidance_interval=(0, 1 if start is None else 1 - start), null_label=null)
    noise, labels = torch.from_numpy(LDIT["in.latents"]), torch.from_numpy(LDIT["in.y"])
    out = euler(velocity, noise, labels, **settings, guidance_channels=3)
    close(out, LDIT[f"{run['name']}.out"], 1e-5, 1e-7)
    times, guided = zip(*calls, strict=True)
    close(1 - torch.tensor(times), LDIT[f"{run['name']}.t"], 0, 5e-7)
    assert list(guided) == (run["guided"] or [False] * len(calls))


def test_a_shifted_sde_begins_and_ends_where_it_did():
    for shift in (0.3, 1.0, 3.0):
        times = sde_times(5, shift)
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
        assert times[-2] == pytest.approx(shift * 0.04 / (1 + (shift - 1) * 0.04))


def gaussian_velocity(x_t, t, labels):
    """The exact velocity of the linear path when the data are N(0, s^2): E[noise - x_0 | x_t]."""
    s2 = 0.25
    t = t.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * s2 + t**2
    return (t - (1 - t) * s2) / variance * x_t


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_errors_shrink_with_the_samplers_order(sampler, order, shift):
    """The ODE maps N(0, 1) to N(0, s^2) linearly: x_0 = s x_1. Halving the step divides the error by 2^order."""
    noise, labels = torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    errors = [
        abs(sampler(gaussian_velocity, noise, labels, num_steps=n, time_shift=shift).item() - 0.5)
        for n in (40, 80, 160)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_sde_reaches_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *_: torch.randn(20000, 1, 1, 1, generator=generator)  # noqa: E731
    labels, settings = torch.zeros(20000, dtype=torch.long), dict(num_steps=200, path_type="linear", step_noise=draw)
    x = euler_maruyama(gaussian_velocity, draw(), labels, **settings)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(x.mean().item()) < 0.02


def test_guidance_needs_a_null_label_only_above_one():
    noise, labels = torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    euler(gaussian_velocity, noise, labels, num_steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match="null label"):
        euler(gaussian_velocity, noise, labels, num_steps=1, guidance_scale=1.5)
