"""Normalised latents, samples of cached posteriors, and statistics over them."""

import pytest
import torch

from dataset.latents import LatentStatistics, denormalize, normalize, sample_mean_std
from tests.support.golden_data import close, load
from utils.errors import InputError


def test_denormalizing_undoes_normalizing():
    arrays, _ = load("preprocess")
    z, scale, bias = (torch.from_numpy(arrays[f"latents.{name}"]) for name in ("z", "scale", "bias"))
    x_0 = normalize(z, scale, bias)
    close(x_0, arrays["latents.normalized"], 1e-6)
    close(denormalize(z, scale, bias), arrays["latents.denormalized"], 1e-6)
    torch.testing.assert_close(denormalize(x_0, scale, bias), z)


def test_a_cached_latent_is_sampled_as_mean_plus_noisy_std():
    mean, std, eps = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(sample_mean_std(torch.cat([mean, std], dim=1), eps), mean + std * eps)


def test_statistics_are_those_of_the_posteriors_samples():
    # Channel 0: means -1 and 3, std 0: mean 1, variance 4. Channel 1: mean 5, std 2 throughout.
    rows = torch.tensor([[-1.0, 5, 0, 2], [3.0, 5, 0, 2]])[:, :, None, None].expand(-1, -1, 3, 3)
    statistics = LatentStatistics(2)
    for row in rows:
        statistics.add(row[None])
    scale, bias = statistics.scale_and_bias()
    assert scale.flatten().tolist() == [0.5, 0.5] and bias.flatten().tolist() == [1.0, 5.0]
    with pytest.raises(InputError, match="constant"):
        constant = LatentStatistics(1)
        constant.add(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1))
        constant.scale_and_bias()
