"""The VAE's loss: reconstruction, LPIPS, KL and the generator's side of the GAN.

It is the recipe of SD-VAE, and the regularisation L_REG of REPA-E (arXiv 2504.10483, section 3), which keeps the VAE a
good autoencoder while the alignment moves its latents.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss.adversarial import adversarial_factor
from loss.config import VAELossConfig
from models.posterior import kl


class VAELoss:
    """Weighs the terms of one batch; it holds no network that learns.

    Args:
        config: weights and schedule.
        lpips: `loss.perceptual.load_lpips()`, on the device of the images; None where `perceptual_weight` is 0.
    """

    def __init__(self, config: VAELossConfig, lpips: nn.Module | None):
        assert (lpips is not None) == (config.perceptual_weight > 0), "LPIPS goes with a perceptual weight above 0"
        self.config = config
        self.lpips = lpips

    def __call__(
        self, pixels: Tensor, reconstruction: Tensor, moments: Tensor, discriminator: nn.Module, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and its terms, in float32 whatever autocast is on.

        Args:
            pixels, reconstruction: [-1, 1], (B, 3, H, W); gradients flow into the reconstruction.
            moments: posterior mean and clamped log-variance (B, 2C, h, w).
            discriminator: in train mode, its parameters frozen by the caller (`utils.modules.frozen`). It is called
                once on the reconstruction, which moves its batch statistics, unless the generator term is off.
            step: optimiser step, counted from 0.

        Returns:
            The loss to differentiate, and detached scalars: `reconstruction_loss`, `perceptual_loss`, `kl_loss`,
            `weighted_gan_loss` as they enter the sum; `gan_loss` unweighted; `discriminator_factor`, `d_weight`.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return self._terms(pixels.float(), reconstruction.float(), moments.float(), discriminator, step)

    def _terms(self, pixels, reconstruction, moments, discriminator, step):
        config = self.config

        # Reconstruction: the likelihood of a Laplace (L1) or Gaussian (L2) whose variance is fixed.
        distance = F.l1_loss if config.reconstruction_loss == "l1" else F.mse_loss
        likelihood_scale = config.reconstruction_weight / math.exp(config.logvar_init)
        reconstruction_loss = likelihood_scale * distance(reconstruction, pixels)

        perceptual_loss = pixels.new_zeros(())
        if self.lpips is not None:
            perceptual_loss = config.perceptual_weight * self.lpips(pixels, reconstruction).mean()

        kl_loss = config.kl_weight * kl(moments).mean()

        # The generator's side of the hinge GAN: raise the discriminator's logits of the reconstruction.
        factor = adversarial_factor(config, step)
        gan_loss = pixels.new_zeros(())
        if factor > 0 and config.discriminator_weight > 0:
            gan_loss = -discriminator(reconstruction).mean()
        weighted_gan_loss = config.discriminator_weight * factor * gan_loss

        total = reconstruction_loss + perceptual_loss + kl_loss + weighted_gan_loss
        terms = {
            "reconstruction_loss": reconstruction_loss,
            "perceptual_loss": perceptual_loss,
            "kl_loss": kl_loss,
            "weighted_gan_loss": weighted_gan_loss,
            "gan_loss": gan_loss,
            "discriminator_factor": torch.full_like(gan_loss, factor),
            "d_weight": torch.full_like(gan_loss, config.discriminator_weight),
        }
        return total, {name: term.detach() for name, term in terms.items()}
