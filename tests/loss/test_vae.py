"""The VAE's loss: parity with the public implementation, the sum of its terms, float32."""

import math

import pytest
import torch
import torch.nn.functional as F

from loss.config import VAELossConfig
from loss.vae import VAELoss
from tests.support.loss_data import META, check_losses, filled_discriminator, inputs


@pytest.fixture
def discriminator():
    return filled_discriminator()


@pytest.mark.parametrize("variant", META["variants"])
def test_loss_and_gradients_are_those_of_the_public_code(variant, lpips):
    check_losses(variant, lpips)


def test_without_weights_no_network_is_used():
    config = VAELossConfig(perceptual_weight=0, discriminator_weight=0, kl_weight=0, reconstruction_loss="l2")
    pixels, reconstruction, moments = inputs()
    total, terms = VAELoss(config, None)(pixels, reconstruction, moments, None, 0)  # None: nothing may be called
    assert total.item() == pytest.approx(F.mse_loss(pixels, reconstruction).item())
    assert terms["gan_loss"] == terms["perceptual_loss"] == terms["kl_loss"] == 0


def test_terms_add_up(lpips, discriminator):
    config = VAELossConfig(reconstruction_weight=2.0, logvar_init=-0.3, kl_weight=0.1)
    pixels, reconstruction, moments = inputs()
    total, terms = VAELoss(config, lpips)(pixels, reconstruction, moments, discriminator, 0)
    parts = ("reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss")
    assert total.item() == pytest.approx(sum(terms[part].item() for part in parts), rel=1e-6)
    l1 = (pixels - reconstruction).abs().mean().item()
    assert terms["reconstruction_loss"].item() == pytest.approx(2.0 / math.exp(-0.3) * l1, rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())


def test_losses_are_float32_under_autocast(lpips, discriminator):
    pixels, reconstruction, moments = inputs()
    loss = VAELoss(VAELossConfig(), lpips)
    expected, _ = loss(pixels, reconstruction, moments, discriminator.eval(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(pixels, reconstruction, moments, discriminator, 0)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
