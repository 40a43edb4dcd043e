"""From sample numbers and labels to images: seeded noise, a sampler, the VAE's decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor

from models.sampling import euler, euler_maruyama, heun
from models.sit import SiT
from models.vae import decode, encode_moments, split_moments
from utils.images import to_signed, to_uint8
from utils.latents import denormalize
from utils.rng import sample_normal


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn; `guidance_scale` 1 is without guidance."""

    mode: str = "ode"  # or "sde"
    heun: bool = False
    num_steps: int = 50
    path_type: str = "linear"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def nfe(self) -> int:
        """Evaluations of the network per sample; under guidance a conditional and unconditional pair counts as one."""
        return 2 * self.num_steps - 1 if self.heun else self.num_steps


@torch.no_grad()
def sample_latents(sit: SiT, indices: Sequence[int], labels: Tensor, seed: int, config: SamplerConfig,
                   watch: Callable[[float, Tensor], None] = lambda t, x_t: None) -> Tensor:  # fmt: skip
    """Normalised latents x_0 (B, C, h, w) float64 of the samples with these numbers.

    Every draw depends on (seed, sample number) alone, and is made on the CPU: the same bits on every device.

    Args:
        sit: in evaluation mode.
        indices: sample numbers.
        labels: (B,) int64 on the network's device.
        watch: is told t and x_t (B, C, h, w) at every evaluation of the network.
    """
    shape = (sit.in_channels, sit.grid * sit.patch_size, sit.grid * sit.patch_size)
    device = sit.pos_embed.device

    def draw(purpose: str) -> Tensor:
        return sample_normal(seed, purpose, indices, shape).to(device, non_blocking=True)

    common = dict(num_steps=config.num_steps, guidance_scale=config.guidance_scale,
                  guidance_interval=config.guidance_interval, null_label=sit.null_label)  # fmt: skip

    def velocity(x_t, t, y):
        watch(t[0].item(), x_t[: len(labels)])
        return sit(x_t, t, y)[0].float()

    if config.mode == "sde":
        step_noise = lambda i: draw(f"step {i}")  # noqa: E731
        return euler_maruyama(
            velocity, draw("noise"), labels, path_type=config.path_type, step_noise=step_noise, **common
        )
    return (heun if config.heun else euler)(velocity, draw("noise"), labels, **common)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, x_0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) of normalised latents; scale and bias are the latent statistics (1, C, 1, 1)."""
    return to_uint8(decode(vae, denormalize(x_0.float(), scale, bias)))


@torch.no_grad()
def trajectory(sit: SiT, vae: AutoencoderKL, latent_stats: tuple[Tensor, Tensor], indices: Sequence[int],
               labels: Tensor, seed: int, config: SamplerConfig, frames: int = 9) -> Tensor:  # fmt: skip
    """Samples on their way: decoded x_t at about evenly spaced steps and at the end, uint8 (B, frames, 3, H, W)."""
    states = {}
    x_0 = sample_latents(sit, indices, labels, seed, config, watch=lambda t, x_t: states.setdefault(t, x_t.clone()))
    times = sorted(states, reverse=True)
    chosen = [times[i * len(times) // (frames - 1)] for i in range(frames - 1)]
    return torch.stack(
        [decode_latents(vae, x_t, *latent_stats).cpu() for x_t in (*map(states.get, chosen), x_0)], dim=1
    )


@torch.no_grad()
def preview(sit: SiT, vae: AutoencoderKL, latent_stats: tuple[Tensor, Tensor], count: int, seed: int,
            config: SamplerConfig, *, rank: int = 0, world_size: int = 1) -> Tensor | None:  # fmt: skip
    """The same `count` samples at every call, their classes spread evenly; uint8 (count, 3, H, W) on rank 0.

    Processes share the work. Nothing here touches the training's random draws.
    """
    scale, bias = latent_stats
    mine = range(rank, count, world_size)
    labels = torch.tensor([i * sit.num_classes // count for i in mine], device=scale.device)
    images = []
    for start in range(0, len(mine), 16):
        indices = mine[start : start + 16]
        x_0 = sample_latents(sit, indices, labels[start : start + 16], seed, config)
        images.append(decode_latents(vae, x_0, scale, bias).cpu())
    share = dict(zip(mine, torch.cat(images), strict=True)) if images else {}
    shares = [share]
    if world_size > 1:
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(share, shares, dst=0)
        if rank != 0:
            return None
    whole = {i: image for share in shares for i, image in share.items()}
    return torch.stack([whole[i] for i in range(count)])


@torch.no_grad()
def reconstruction_pairs(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W), each followed by its reconstruction from the posterior's mean: (2B, 3, H, W)."""
    mean, _ = split_moments(encode_moments(vae, to_signed(images)))
    return torch.stack([images, to_uint8(decode(vae, mean))], dim=1).flatten(0, 1)
