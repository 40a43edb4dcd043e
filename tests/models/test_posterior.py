"""The VAE's posterior: closed forms, diffusers' own, and the statistics of a data set's latents."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models.posterior import TrainableVAE, encode_moments, kl, measure_latent_statistics, sample, split_moments
from models.vae import build_vae
from utils.images import to_signed


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_vae("f4d4-tiny").eval()


def test_sample_and_kl_are_those_of_torch_distributions():
    moments, eps = torch.randn(3, 8, 2, 2), torch.randn(3, 4, 2, 2)
    mean, logvar = split_moments(moments)
    posterior = Normal(mean, torch.exp(0.5 * logvar))
    expected = kl_divergence(posterior, Normal(torch.zeros(()), torch.ones(()))).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl(moments), expected)
    torch.testing.assert_close((sample(moments, eps) - mean) / posterior.stddev, eps)
    assert kl(torch.zeros(2, 8, 1, 1)).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_wrapper_equals_diffusers(tiny):
    pixels, eps = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    moments, z, reconstruction = TrainableVAE(tiny)(pixels, eps)
    posterior = tiny.encode(pixels).latent_dist
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    torch.testing.assert_close(z, posterior.mean + posterior.std * eps)
    assert torch.equal(reconstruction, tiny.decode(z).sample)


@torch.no_grad()
def test_moments_and_latents_stay_float32_under_autocast(tiny):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments, z, reconstruction = TrainableVAE(tiny)(torch.rand(1, 3, 32, 32), torch.randn(1, 4, 8, 8))
    assert (moments.dtype, z.dtype, reconstruction.dtype) == (torch.float32, torch.float32, torch.bfloat16)


class Images:
    """A data set that remembers which images were asked for."""

    def __init__(self, count):
        self.images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
        self.asked = []

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        self.asked += indices
        return self.images[indices], torch.zeros(len(indices), dtype=torch.int64)


@torch.no_grad()
def test_measured_statistics_are_those_of_the_samples(tiny):
    data = Images(20)
    scale, bias = measure_latent_statistics(tiny, data, device="cpu", batch_size=8)
    moments = encode_moments(tiny, to_signed(data.images))
    generator = torch.Generator().manual_seed(0)
    draws = [sample(moments, torch.randn(20, 4, 4, 4, generator=generator)) for _ in range(2000)]
    z = torch.stack(draws).transpose(0, 2).flatten(1).double()  # (C, everything)
    torch.testing.assert_close(bias.flatten().double(), z.mean(dim=1), rtol=0, atol=0.01)
    torch.testing.assert_close(1 / scale.flatten().double(), z.std(dim=1), rtol=0.01, atol=0)
    assert scale.shape == bias.shape == (1, 4, 1, 1) and scale.dtype == torch.float32


def test_large_data_sets_are_sampled_evenly(tiny):
    data = Images(30)
    measure_latent_statistics(tiny, data, device="cpu", batch_size=4, max_images=10)
    assert data.asked == list(range(0, 30, 3))
