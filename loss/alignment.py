"""The representation-alignment loss of REPA (arXiv 2410.06940, eq. 8)."""

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
