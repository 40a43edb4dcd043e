"""The VAE's posterior q(z | x) = N(mean, exp(logvar)): encoding, sampling, decoding, and the latents' statistics.

    images uint8 (B, 3, H, W) -> pixels float [-1, 1] -> moments (B, 2C, h, w) -> z (B, C, h, w) -> pixels

`moments` are mean and log-variance stacked on channels, (B, 2C, h, w), the latter clamped as in the public code.
"""

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dataset.data import evenly_spaced
from dataset.latents import LatentStatistics
from models.vae_architecture import kind_of, latent_channels
from utils.distributed import rank, world_size
from utils.errors import about
from utils.images import to_signed

LOGVAR_RANGE = (-30.0, 20.0)  # of the public DiagonalGaussianDistribution


def encode_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior moments of pixels [-1, 1] (B, 3, H, W): float32 (B, 2C, h, w), log-variance clamped."""
    mean, logvar = kind_of(vae).encode(vae, pixels).float().chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, h, w) -> mean and log-variance, each (B, C, h, w)."""
    return moments.chunk(2, dim=1)


def to_mean_std(moments: Tensor) -> Tensor:
    """Moments (B, 2C, h, w) with the log-variance replaced by the standard deviation: the form that is cached."""
    mean, logvar = split_moments(moments)
    return torch.cat([mean, torch.exp(0.5 * logvar)], dim=1)


def sample(moments: Tensor, eps: Tensor) -> Tensor:
    """z = mean + std * eps with eps ~ N(0, 1) of shape (B, C, h, w)."""
    mean, logvar = split_moments(moments)
    return mean + torch.exp(0.5 * logvar) * eps


def kl(moments: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, 1)) of each sample, summed over its latent values: (B,), in nats."""
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Reconstruction, about [-1, 1], (B, 3, H, W), of latents (B, C, h, w)."""
    return kind_of(vae).decode(vae, z)


class TrainableVAE(nn.Module):
    """Encode, sample and decode as one forward.

    DistributedDataParallel synchronises the gradients of its own forward alone: `encode` and `decode` called from
    outside would train every process by itself. The VAE is the attribute `vae`.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments float32 (B, 2C, h, w) of pixels [-1, 1] (B, 3, H, W)."""
        return encode_moments(self.vae, pixels)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction (B, 3, H, W) of latents (B, C, h, w)."""
        return decode(self.vae, z)

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes the activations again instead of keeping them."""
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # a VAE draws nothing inside
        self.vae.enable_gradient_checkpointing(again)

    def compile_halves(self) -> None:
        """Compile `encode` and `decode`; the VAE inside stays as it is, for previews of other shapes."""
        self.encode = torch.compile(self.encode, fullgraph=True, dynamic=False)
        self.decode = torch.compile(self.decode, fullgraph=True, dynamic=False)

    def forward(self, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moments, latents and reconstruction, under autocast the first two still in float32.

        Args:
            pixels: [-1, 1], (B, 3, H, W).
            eps: N(0, 1), (B, C, h, w).

        Returns:
            moments (B, 2C, h, w), z (B, C, h, w), reconstruction (B, 3, H, W).
        """
        moments = self.encode(pixels)
        z = sample(moments, eps)
        return moments, z, self.decode(z)


@torch.no_grad()
def measure_latent_statistics(
    vae: AutoencoderKL,
    data,
    *,
    device: torch.device | str,
    batch_size: int = 32,
    max_images: int = 50_000,
) -> tuple[Tensor, Tensor]:
    """Scale (1 / std) and bias (mean) of a data set's latents, float32 (1, C, 1, 1) on the CPU, equal on all ranks.

    The processes share the batches.

    Args:
        vae: on `device`, in eval mode.
        data: `len(data)` and `data.__getitems__(indices) -> (images uint8 (B, 3, H, W), ...)`.
        max_images: of a larger data set so many are taken, evenly spread over its order (which is by class).
        batch_size: images at a time per process.

    Raises:
        InputError: the VAE's latents are not finite, or a channel is constant.
    """
    statistics = LatentStatistics(latent_channels(vae), device)
    chosen = evenly_spaced(len(data), max_images)
    for first in range(rank() * batch_size, len(chosen), world_size() * batch_size):
        images = data.__getitems__(chosen[first : first + batch_size])[0].to(device)
        statistics.add(to_mean_std(encode_moments(vae, to_signed(images))))
    with about("--vae-ckpt"):
        return statistics.scale_and_bias()
