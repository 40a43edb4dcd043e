"""The spread of latents. What ends a run is in tests/scripts/test_bad_numbers.py."""

import pytest
import torch
from torch import nn

from training.health import LatentSpread


class GivesLatents(nn.Module):
    """Stands for a VAE whose latents are these."""

    def forward(self, z):
        return None, z, None


def test_the_spread_is_that_of_channels_averaged_over_batches():
    vae = GivesLatents()
    spread = LatentSpread(vae)
    one = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for z in (one, one * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)):
        vae(z)
    a, b = (one[:, channel].std(correction=0).item() for channel in range(2))
    found = spread.scalars()
    assert not found["latent_std"].requires_grad
    assert found["latent_std"].item() == pytest.approx((a + b + a + 5 * b) / 4)
    assert found["latent_std_ratio"].item() == pytest.approx((max(a, b) / min(a, b) + 5 * b / a) / 2)
    assert spread.scalars() == {}  # the VAE has rested since

    vae(torch.stack([one[:, 0], torch.full((4, 3, 3), 0.1 / 3)], dim=1))  # a channel has collapsed
    found = spread.scalars()
    assert found["latent_std"].item() == pytest.approx(a / 2, abs=1e-6) and found["latent_std_ratio"] > 1e6
