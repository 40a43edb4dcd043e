"""The path from data (t = 0) to noise (t = 1): x_t = alpha_t x_0 + sigma_t noise (SiT, arXiv 2401.08740, section 2)."""

import math

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
    alpha, sigma, d_alpha, d_sigma = coefficients(t.view(-1, *[1] * (x_0.dim() - 1)), path_type)
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
            ratio sigma / alpha (linear) or tan (cosine) is exp(draw).
    """
    if weighting == "uniform":
        return draw
    ratio = draw.exp()
    return ratio / (1 + ratio) if path_type == "linear" else 2 / math.pi * ratio.atan()
