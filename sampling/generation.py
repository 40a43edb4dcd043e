"""From sample numbers and labels to images: seeded noise, a sampler, the VAE's decoder."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dataset.latents import denormalize
from models.posterior import decode, encode_moments, split_moments
from models.sit import SiT
from models.vae import downsampling
from sampling.samplers import euler, euler_maruyama, heun
from utils.background import to_device
from utils.distributed import gather_rows, rank, world_size
from utils.images import to_signed, to_uint8
from utils.rng import sample_normal

PREVIEW_GUIDANCE = 4.0
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PREVIEW_BATCH = 8


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn; `guidance_scale` 1 is without guidance, and the path counts in mode "sde" alone."""

    mode: str = "ode"  # or "sde"
    heun: bool = False
    num_steps: int = 50
    time_shift: float = 1.0  # of the grid of times
    path_type: str = "linear"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None  # the first, which alone are guided; None: all
    precision: str = "fp32"  # of SiT: "bf16" and "fp16" are autocast, "tf32" is float32 as far as this module goes

    def nfe(self) -> int:
        """Evaluations of the network per sample; under guidance a conditional and unconditional pair counts as one."""
        return 2 * self.num_steps - 1 if self.heun else self.num_steps


@torch.no_grad()
def sample_latents(
    sit: SiT,
    indices: Sequence[int],
    labels: Tensor,
    seed: int,
    sampler: SamplerConfig,
    watch: Callable[[int, Tensor], None] | None = None,
    guide: SiT | None = None,
) -> Tensor:
    """Normalised latents x_0 (B, C, h, w) float64 of the samples with these numbers.

    Every draw depends on (seed, sample number) alone, and is made on the CPU: the same bits on every device. On CUDA
    nothing here waits for the device, so that the noise of an SDE step is drawn while the device is still computing.

    Args:
        sit: in evaluation mode.
        indices: sample numbers.
        labels: (B,) int64 on the network's device.
        watch: is told the number of the evaluation of the network, from 0, and x_t (B, C, h, w) float32 there.
        guide: a weaker network of the same latents, for autoguidance in place of classifier-free guidance.
    """
    shape = (sit.in_channels, sit.grid * sit.patch_size, sit.grid * sit.patch_size)
    device = sit.pos_embed.device
    evaluations = itertools.count()
    dtype = AUTOCAST.get(sampler.precision)

    def draw(purpose: str) -> Tensor:
        return to_device(sample_normal(seed, purpose, indices, shape), device)

    def evaluate(network: SiT, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return network(x_t, t, y)[0].float()

    def velocity(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if watch is not None:
            watch(next(evaluations), x_t[: len(labels)])
        return evaluate(sit, x_t, t, y)

    common = dict(
        num_steps=sampler.num_steps,
        time_shift=sampler.time_shift,
        guidance_scale=sampler.guidance_scale,
        guidance_interval=sampler.guidance_interval,
        null_label=sit.null_label,
        guidance_channels=sampler.guidance_channels,
        guide=None if guide is None else partial(evaluate, guide),
    )
    if sampler.mode == "sde":
        return euler_maruyama(
            velocity,
            draw("noise"),
            labels,
            path_type=sampler.path_type,
            step_noise=lambda i: draw(f"step {i}"),
            **common,
        )
    return (heun if sampler.heun else euler)(velocity, draw("noise"), labels, **common)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, x_0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W) of normalised latents; scale and bias are the latent statistics (1, C, 1, 1)."""
    return to_uint8(decode(vae, denormalize(x_0.float(), scale, bias)))


def draw_images(
    sit: SiT,
    vae: AutoencoderKL,
    latent_stats: tuple[Tensor, Tensor],
    indices: Sequence[int],
    labels: Tensor,
    seed: int,
    sampler: SamplerConfig,
) -> Tensor:
    """Images uint8 (B, 3, H, W) of the samples with these numbers; as `sample_latents` and `decode_latents`.

    Raises:
        FloatingPointError: a sample is not finite; as an image it would be black, and would be measured as one.
    """
    x_0 = sample_latents(sit, indices, labels, seed, sampler)
    if not x_0.isfinite().all():
        raise FloatingPointError("samples are not finite")
    return decode_latents(vae, x_0, *latent_stats)


@torch.no_grad()
def trajectory(
    sit: SiT,
    vae: AutoencoderKL,
    latent_stats: tuple[Tensor, Tensor],
    indices: Sequence[int],
    labels: Tensor,
    seed: int,
    sampler: SamplerConfig,
    *,
    shown: int,
    frames: int = 9,
    guide: SiT | None = None,
) -> Tensor:
    """The first samples of a batch on their way, uint8 (shown, frames, 3, H, W) on the CPU.

    Frame 0 is the noise and the last frame the sample, decoded; between them lie states at about evenly spaced steps.
    There are fewer frames where there are fewer steps. The whole batch is drawn, in the shapes of the job.
    """
    frames = min(frames, sampler.num_steps + 1)
    # Heun's second evaluation of a step is at a predicted state; the state itself is the one before it.
    per_step = 2 if sampler.heun else 1
    chosen = {per_step * (i * sampler.num_steps // (frames - 1)) for i in range(frames - 1)}
    states = []

    def watch(evaluation: int, x_t: Tensor) -> None:
        if evaluation in chosen:
            states.append(x_t)

    states.append(sample_latents(sit, indices, labels, seed, sampler, watch, guide))
    return torch.stack([decode_latents(vae, x_t, *latent_stats)[:shown].cpu() for x_t in states], dim=1)


def preview_sampler(sit: SiT, path_type: str) -> SamplerConfig:
    """How previews are drawn: Euler, with strong guidance where the model has a null label."""
    guidance = PREVIEW_GUIDANCE if sit.null_label is not None else 1.0
    return SamplerConfig(path_type=path_type, guidance_scale=guidance)


@torch.no_grad()
def preview(
    sit: SiT,
    vae: AutoencoderKL,
    latent_stats: tuple[Tensor, Tensor],
    count: int,
    seed: int,
    sampler: SamplerConfig,
    *,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """The same `count` samples at every call, uint8 (count, 3, H, W) on every process.

    Their classes are spread evenly over `classes` (None: all of the model's). Processes share the work, in batches that
    do not depend on their number. Nothing here touches the training's random draws.
    """
    device = sit.pos_embed.device
    classes = range(sit.num_classes) if classes is None else classes
    side = sit.grid * sit.patch_size * downsampling(vae)
    images, numbers = [torch.empty(0, 3, side, side, dtype=torch.uint8)], []
    for start in range(rank() * PREVIEW_BATCH, count, world_size() * PREVIEW_BATCH):
        indices = range(start, min(start + PREVIEW_BATCH, count))
        labels = torch.tensor([int(classes[i * len(classes) // count]) for i in indices], device=device)
        x_0 = sample_latents(sit, indices, labels, seed, sampler)
        images.append(decode_latents(vae, x_0, *latent_stats).cpu())
        numbers += indices
    order = gather_rows(torch.tensor(numbers, dtype=torch.int64)).argsort()
    return gather_rows(torch.cat(images))[order]


@torch.no_grad()
def reconstruction_pairs(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images uint8 (B, 3, H, W), each followed by its reconstruction from the posterior's mean: (2B, 3, H, W)."""
    mean, _ = split_moments(encode_moments(vae, to_signed(images)))
    return torch.stack([images, to_uint8(decode(vae, mean))], dim=1).flatten(0, 1)
