"""The VAE's loss: parity with the public implementation, the sum of its terms, float32."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from loss.adversarial import DiscriminatorLoss
from loss.config import VAELossConfig
from loss.vae import VAELoss
from tests.support.golden_data import close
from tests.support.loss_data import ARRAYS, META, filled_discriminator, inputs
from utils.modules import frozen


@pytest.fixture
def discriminator():
    return filled_discriminator()


@pytest.mark.parametrize("variant", META["variants"])
def test_loss_and_gradients_are_those_of_the_public_code(variant, lpips, discriminator):
    settings = META["variants"][variant]
    config = dataclasses.replace(VAELossConfig(), **settings["config_overrides"])
    vae_loss, discriminator_loss = VAELoss(config, lpips), DiscriminatorLoss(config)
    pixels, reconstruction, moments = inputs()
    discriminator.train()
    for number in range(settings["rounds"]):
        prefix = f"full.{variant}." + (f"{number}." if settings["rounds"] > 1 else "")
        check_round(prefix, vae_loss, discriminator_loss, discriminator, pixels, reconstruction, moments, settings)
        pixels = 0.9 * pixels
    if config.lecam_regularization_weight:
        close(discriminator_loss.real_logits_mean, ARRAYS[f"{prefix}ema_real_logits_mean"], 3e-5)
        close(discriminator_loss.fake_logits_mean, ARRAYS[f"{prefix}ema_fake_logits_mean"], 3e-5)


def check_round(prefix, vae_loss, discriminator_loss, discriminator, pixels, reconstruction, moments, settings):
    x, m = reconstruction.clone().requires_grad_(), moments.clone().requires_grad_()
    with frozen(discriminator):
        total, terms = vae_loss(pixels, x, m, discriminator, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        close(value, ARRAYS[f"{prefix}gen.{name}"].reshape(()), 3e-5, 1e-7, what=name)
    close(x.grad, ARRAYS[f"{prefix}gen.grad_recon"], 5e-5)
    close(m.grad, ARRAYS[f"{prefix}gen.grad_moments"], 5e-5)
    assert all(parameter.grad is None for parameter in discriminator.parameters())

    logits = discriminator(pixels), discriminator(reconstruction)
    total, terms = discriminator_loss(*logits, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        public = "discriminator_loss" if name == "d_loss" else name
        close(value, ARRAYS[f"{prefix}disc.{public}"].reshape(()), 3e-5, 1e-7, what=name)
    expected_norms = META["disc_grad_l2"].get(prefix.rstrip("."), {})
    for name, parameter in discriminator.named_parameters():
        if (key := f"{prefix}disc.grad.{name}") in ARRAYS:
            close(parameter.grad, ARRAYS[key], 5e-5, what=name)
        if name in expected_norms:
            assert parameter.grad.norm().item() == pytest.approx(expected_norms[name], rel=5e-4, abs=1e-9), name
    for name, buffer in discriminator.named_buffers():
        if (key := f"{prefix}bn_after.{name}") in ARRAYS:
            close(buffer, ARRAYS[key], 3e-5, what=name)
    discriminator.zero_grad()


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
