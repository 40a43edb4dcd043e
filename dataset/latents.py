"""Latents between the VAE and SiT: normalisation, the posterior's sample, statistics.

`mean_std` is mean and standard deviation of the VAE's posterior, stacked on channels: (B, 2C, h, w).
"""

import torch
from torch import Tensor

from utils.distributed import all_sum
from utils.errors import InputError

ROUNDING = 1e-4  # of float32 statistics that went through a variance, a reciprocal and a file


def normalize(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Raw latents -> x_0 of about zero mean and unit variance; scale (1 / std) and bias (mean) are (1, C, 1, 1)."""
    return (z - bias) * scale


def denormalize(x_0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The inverse of `normalize`."""
    return x_0 / scale + bias


def sample_mean_std(mean_std: Tensor, eps: Tensor) -> Tensor:
    """z (B, C, h, w) = mean + std * eps of cached (B, 2C, h, w), with eps ~ N(0, 1)."""
    mean, std = mean_std.chunk(2, dim=1)
    return mean + std * eps


def difference(statistics: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> str | None:
    """How two pairs of scale (1 / std) and bias (mean), each (1, C, 1, 1), differ; None: by rounding at most."""
    (scale, bias), (other_scale, other_bias) = statistics, others
    in_std = (other_scale / scale - 1).abs().max().item()
    in_mean = ((other_bias - bias) * scale).abs().max().item()
    if max(in_std, in_mean) < ROUNDING:
        return None
    return f"by up to {100 * in_std:.2g} % in the standard deviation and {in_mean:.2g} of one in the mean"


class LatentStatistics:
    """Mean and variance of each channel of the latents, from their posteriors: nothing is drawn.

    E[z] = E[mean], Var[z] = Var[mean] + E[std^2], over images and positions.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        # Sums of mean, mean^2 and std^2, and their number; float64, because the variance is a difference.
        self.sums = torch.zeros(4, channels, dtype=torch.float64, device=device)

    def add(self, mean_std: Tensor) -> None:
        """Count a batch (B, 2C, h, w)."""
        mean, std = mean_std.to(self.sums).chunk(2, dim=1)
        terms = (mean, mean.square(), std.square(), torch.ones_like(mean))
        self.sums += torch.stack([term.sum(dim=(0, 2, 3)) for term in terms])

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """1 / std and mean over all processes' batches: float32 (1, C, 1, 1) on the CPU, equal on every process.

        Raises:
            InputError: a channel is constant, or a value is not finite.
        """
        sums = self.sums.cpu()
        all_sum(sums)
        mean, mean_square, variance = sums[:3] / sums[3]  # E[mean], E[mean^2], E[std^2]
        std = (mean_square - mean.square() + variance).clamp(min=0.0).sqrt()
        if not (torch.isfinite(std).all() and (std > 0).all()):
            raise InputError("the VAE's latents are constant or not finite on this data set; is it a trained VAE?")
        return (1.0 / std).float().reshape(1, -1, 1, 1), mean.float().reshape(1, -1, 1, 1)
