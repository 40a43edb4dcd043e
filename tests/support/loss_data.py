"""The golden cases of the losses on any device, and the discriminator that they were recorded with."""

import copy
import dataclasses
import json

import torch

from loss.adversarial import DiscriminatorLoss
from loss.config import VAELossConfig
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator
from tests.support.golden_data import GOLDEN, Tally, filled, load
from utils.images import to_signed
from utils.modules import frozen

ARRAYS, META = load("loss")

DISCRIMINATOR = json.loads((GOLDEN / "manifests.json").read_text())["discriminator"]["state_dict"]


def inputs(device="cpu"):
    """Pixels, reconstruction, moments."""
    image, *others = (torch.from_numpy(ARRAYS[f"in.{key}"]).to(device) for key in ("image_u8", "recon", "moments"))
    return to_signed(image), *others


def filled_discriminator() -> PatchDiscriminator:
    network = PatchDiscriminator()
    network.load_state_dict(filled(DISCRIMINATOR))
    return network


def check_losses(variant: str, lpips, device="cpu", tally=None) -> None:
    """The VAE's loss and the discriminator's, with their gradients, of one configuration."""
    tally, settings = tally or Tally(), META["variants"][variant]
    config = dataclasses.replace(VAELossConfig(), **settings["config_overrides"])
    lpips, discriminator = copy.deepcopy(lpips).to(device), filled_discriminator().to(device).train()
    vae_loss, discriminator_loss = VAELoss(config, lpips), DiscriminatorLoss(config).to(device)
    pixels, reconstruction, moments = inputs(device)
    for number in range(settings["rounds"]):
        prefix = f"full.{variant}." + (f"{number}." if settings["rounds"] > 1 else "")
        check_vae_loss(tally, prefix, vae_loss, discriminator, pixels, reconstruction, moments, settings)
        check_discriminator_loss(tally, prefix, discriminator_loss, discriminator, pixels, reconstruction, settings)
        pixels = 0.9 * pixels
    if config.lecam_regularization_weight:
        for kind in ("real", "fake"):
            mean = getattr(discriminator_loss, f"{kind}_logits_mean")
            tally.close("losses", mean, ARRAYS[f"{prefix}ema_{kind}_logits_mean"], 3e-5)


def check_vae_loss(tally, prefix, vae_loss, discriminator, pixels, reconstruction, moments, settings):
    x, m = reconstruction.clone().requires_grad_(), moments.clone().requires_grad_()
    with frozen(discriminator):
        total, terms = vae_loss(pixels, x, m, discriminator, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        tally.close("losses", value, ARRAYS[f"{prefix}gen.{name}"].reshape(()), 3e-5, 1e-7, name)
    tally.close("gradients", x.grad, ARRAYS[f"{prefix}gen.grad_recon"], 5e-5)
    tally.close("gradients", m.grad, ARRAYS[f"{prefix}gen.grad_moments"], 5e-5)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def check_discriminator_loss(tally, prefix, discriminator_loss, discriminator, pixels, reconstruction, settings):
    logits = discriminator(pixels), discriminator(reconstruction)
    total, terms = discriminator_loss(*logits, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        public = "discriminator_loss" if name == "d_loss" else name
        tally.close("losses", value, ARRAYS[f"{prefix}disc.{public}"].reshape(()), 3e-5, 1e-7, name)
    expected_norms = META["disc_grad_l2"].get(prefix.rstrip("."), {})
    for name, parameter in discriminator.named_parameters():
        if (key := f"{prefix}disc.grad.{name}") in ARRAYS:
            tally.close("gradients", parameter.grad, ARRAYS[key], 5e-5, where=name)
        if name in expected_norms:
            apart = abs(parameter.grad.norm().item() - expected_norms[name])
            tally.within("gradient norms", apart, max(5e-4 * expected_norms[name], 1e-9), name)
    for name, buffer in discriminator.named_buffers():
        if (key := f"{prefix}bn_after.{name}") in ARRAYS:
            tally.close("batch statistics", buffer, ARRAYS[key], 3e-5, where=name)
    discriminator.zero_grad()


def check_lpips(lpips, device="cpu", tally=None) -> None:
    """LPIPS and its gradient."""
    tally, lpips = tally or Tally(), copy.deepcopy(lpips).to(device)
    pixels, reconstruction, _ = inputs(device)
    reconstruction.requires_grad_()
    value = lpips(pixels, reconstruction)
    tally.close("losses", value, ARRAYS["lpips.value"], 3e-5)
    value.mean().backward()
    tally.close("gradients", reconstruction.grad, ARRAYS["lpips.grad_recon_of_mean"], 5e-5)
    tally.close("losses", lpips(pixels, pixels), ARRAYS["lpips.value_same"], 0, 1e-7)
