"""Trajectories and previews: which states they show, and the same for any number of processes."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.sit import SiT
from sampling import generation
from sampling.generation import SamplerConfig, decode_latents, preview, sample_latents
from sampling.trained import load_trained
from tests.support.sampling import CLASSES, SIDE, difference


def test_heun_trajectory_shows_states_not_predictions(exps):
    """The second frame is Heun's first step, done by hand, and not its Euler prediction."""
    trained = load_trained(exps / "repae")
    labels, config = torch.arange(4), SamplerConfig(heun=True, num_steps=4, guidance_scale=1.5)
    frames = generation.trajectory(trained.sit, trained.vae, trained.latent_stats, range(4), labels, 0, config, shown=4)
    noise = generation.sample_normal(0, "noise", range(4), (4, 6, 6)).double()

    def guided(x, t):
        both = [trained.sit(x.float(), torch.full((4,), t), y)[0].double() for y in (labels, torch.full((4,), CLASSES))]
        return both[1] + 1.5 * (both[0] - both[1])

    slope = guided(noise, 1.0)
    state = noise - 0.25 * (slope + guided(noise - 0.25 * slope, 0.75)) / 2
    expected = decode_latents(trained.vae, state, *trained.latent_stats)
    assert difference(frames[:, 1].numpy(), expected.numpy()).max() <= 1


def test_previews_are_the_same_for_any_number_of_processes(exps, monkeypatch):
    trained, config = load_trained(exps / "repae"), SamplerConfig(num_steps=2, guidance_scale=4.0)
    networks = (trained.sit, trained.vae, trained.latent_stats)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = preview(*networks, 20, 5, config)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert images.shape == (20, 3, SIDE, SIDE) and images.dtype == torch.uint8

    labels = torch.arange(8) * CLASSES // 20  # the classes are spread evenly
    first = decode_latents(*networks[1:2], sample_latents(trained.sit, range(8), labels, 5, config), *networks[2])
    assert torch.equal(images[:8], first)
    some = preview(*networks, 3, 5, config, classes=[7, 2])
    expected = sample_latents(trained.sit, range(3), torch.tensor([7, 7, 2]), 5, config)
    assert torch.equal(some, decode_latents(trained.vae, expected, *trained.latent_stats))

    for world_size in (2, 4):  # each process's share; what gathers them is tried by two in tests/scripts
        monkeypatch.setattr(generation, "world_size", lambda world_size=world_size: world_size)
        shares = []
        for rank in range(world_size):
            monkeypatch.setattr(generation, "rank", lambda rank=rank: rank)
            shares.append(preview(*networks, 20, 5, config))
        numbers = torch.tensor([i for rank in range(world_size) for i in range(20) if i // 8 % world_size == rank])
        assert torch.equal(torch.cat(shares)[numbers.argsort()], images)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_rounds_the_network_alone(exps, monkeypatch, precision):
    """The state is the float64 sum of the velocities as the network gave them, guided in float64, to the last bit."""
    trained, given, forward = load_trained(exps / "repae"), [], SiT.forward

    def noted(sit, x_t, t, labels):
        assert x_t.dtype == t.dtype == torch.float32
        velocity, projections = forward(sit, x_t, t, labels)
        given.append(velocity)
        return velocity, projections

    monkeypatch.setattr(SiT, "forward", noted)
    config = SamplerConfig(num_steps=4, guidance_scale=1.5, precision=precision)
    x_0 = sample_latents(trained.sit, range(3), torch.arange(3), 0, config)
    x = generation.sample_normal(0, "noise", range(3), (4, 6, 6)).double()
    for velocity in given:
        assert velocity.dtype == generation.AUTOCAST[precision]
        conditional, unconditional = velocity.double().chunk(2)
        x = x - 0.25 * (unconditional + 1.5 * (conditional - unconditional))
    assert len(given) == 4 and x_0.dtype == torch.float64 and torch.equal(x_0, x)


class NoValueAsked(TorchDispatchMode):
    """Fails where code waits for a tensor's value, as `if x.isfinite().all()` does."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [dict(), dict(heun=True), dict(mode="sde")])
def test_sampling_asks_for_no_value(exps, options):
    trained, config = load_trained(exps / "repae"), SamplerConfig(num_steps=3, guidance_scale=1.5, **options)
    labels = torch.arange(4)
    with NoValueAsked():
        x_0 = sample_latents(trained.sit, range(4), labels, 0, config)
        decode_latents(trained.vae, x_0, *trained.latent_stats)
        with pytest.raises(AssertionError):
            bool(x_0.isfinite().all())
