"""The path from data (t = 0) to noise (t = 1): x_t = alpha_t x_0 + sigma_t noise (SiT, arXiv 2401.08740, section 2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def coefficients(t: Tensor, path_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha_t, sigma_t and their derivatives in t, of the shape of t; t in [0, 1], path "linear" or "cosine"."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        angle = t * (math.pi / 2)
        return angle.cos(), angle.sin(), -(math.pi / 2) * angle.sin(), (math.pi / 2) * angle.cos()
    raise ValueError(f"path type {path_type!r} is unknown: 'linear' and 'cosine' are known")


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor, path_type: str) -> tuple[Tensor, Tensor]:
    """Noised latents x_t and the velocity d x_t / dt that SiT learns; x_0 and noise (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x_0.dim() - 1))  # (B, 1, ...)
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path_type)
    return alpha * x_0 + sigma * noise, d_alpha * x_0 + d_sigma * noise


def score_from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor, path_type: str) -> Tensor:
    """grad log p_t(x_t) from the velocity (SiT, eq. 9); t in (0, 1], broadcastable to x_t."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path_type)
    ratio = alpha / d_alpha
    return (ratio * velocity - x_t) / (sigma.square() - ratio * d_sigma * sigma)


def time_from_draw(draw: Tensor, weighting: str, path_type: str) -> Tensor:
    """Training times (B,) in [0, 1] from a raw draw.

    Args:
        draw: (B,) uniform on [0, 1) for weighting "uniform"; standard normal for "lognormal", where the noise-to-signal
            ratio sigma / alpha is exp(draw): t = r / (1 + r) on the linear path (elsewhere called logit-normal),
            2/pi atan(r) on the cosine one.
    """
    if weighting == "uniform":
        return draw
    ratio = draw.exp()
    return ratio / (1 + ratio) if path_type == "linear" else 2 / math.pi * ratio.atan()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1], moved towards noise (shift > 1) or towards data (< 1): SD3, arXiv 2403.03206, eq. 23.

    t' = S t / (1 + (S - 1) t), in a form that is exact at 0 and 1, and for S = 1 everywhere.
    """
    return shift * t / (shift * t + (1 - t))


def resolve_time_shift(time_shift: float | str, latent_shape: tuple[int, int, int]) -> float:
    """A shift as `shift_time` takes it; "auto" is sqrt(C h w / 4096), 1 for 4 x 32 x 32 (RAE, arXiv 2510.11690)."""
    return math.sqrt(math.prod(latent_shape) / 4096) if time_shift == "auto" else time_shift


def time_shift_notes(time_shift: float | str, latent_shape: tuple[int, int, int]) -> list[str]:
    """For the log of a run: what "auto" is."""
    shape = " x ".join(map(str, latent_shape))
    shift = resolve_time_shift(time_shift, latent_shape)
    return [f"--time-shift auto: {shift:.4g}, by latents of {shape}"] if time_shift == "auto" else []


@dataclass(frozen=True)
class Noising:
    """How training noises latents: the path, how t is drawn, and the share of labels that is dropped."""

    path_type: str = "linear"  # or "cosine"
    weighting: str = "uniform"  # or "lognormal": of t, not of the loss
    cfg_prob: float = 0.1  # for classifier-free guidance
    time_shift: float | str = 1.0  # as `resolve_time_shift` takes it

    def draw(self, draws, latent_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The random numbers of a micro-step, each from a generator of its own.

        Args:
            draws: `utils.rng.Draws`.
            latent_shape: (C, h, w).

        Returns:
            noise of the posterior (B, C, h, w), noise of the path (B, C, h, w), t (B,), and which labels are dropped
            (B,) bool, or None where none ever are.
        """
        time_draw = draws.normal("time") if self.weighting == "lognormal" else draws.uniform("time")
        shift = resolve_time_shift(self.time_shift, latent_shape)
        t = shift_time(time_from_draw(time_draw, self.weighting, self.path_type), shift)
        drop = draws.uniform("label") < self.cfg_prob if self.cfg_prob > 0 else None
        return draws.normal("posterior", *latent_shape), draws.normal("noise", *latent_shape), t, drop
