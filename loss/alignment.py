"""The representation-alignment loss of REPA (arXiv 2410.06940, eq. 8), and iREPA's targets."""

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(projections: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Minus the cosine between each projected token and its target, averaged over tokens, batch and encoders.

    Args:
        projections: SiT's tokens after each projector, (B, N, F) per encoder.
        targets: the encoders' tokens on the same grid, (B, N, F) per encoder.

    Returns:
        A float32 scalar in [-1, 1]; 0 without encoders.
    """
    if not projections and not targets:
        return torch.zeros(())
    losses = [
        -(F.normalize(projection.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1).mean()
        for projection, target in zip(projections, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def normalize_spatially(targets: Tensor, alpha: float) -> Tensor:
    """(f - alpha mean) / std of each image's channels over its tokens (iREPA, arXiv 2512.10794): what all tokens share
    says nothing about where they are.

    Args:
        targets: an encoder's tokens (B, N, F), N > 1.
        alpha: the share of the mean that is taken off, in [0, 1].

    Returns:
        float32 (B, N, F). The std is the unbiased one, about the mean whatever alpha, and 1e-6 is added to it.
    """
    std, mean = torch.std_mean(targets.float(), dim=1, keepdim=True)
    return (targets - alpha * mean) / (std + 1e-6)
