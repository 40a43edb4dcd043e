"""The diffusion loss, and LightningDiT's direction of the velocity beside it."""

import torch.nn.functional as F
from torch import Tensor


def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """|velocity - target|^2 per sample: (B, C, H, W) -> (B,), the mean over each sample's values, in float32."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def direction_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """1 - the cosine between the channels of velocity and target, the mean over positions: (B, C, H, W) -> (B,).

    LightningDiT's velocity direction loss (arXiv 2501.01423); float32, in [0, 2], and 1 where one of both is 0.
    """
    return (1 - F.cosine_similarity(velocity.float(), target.float(), dim=1, eps=1e-8)).flatten(1).mean(1)
