"""The diffusion loss."""

from torch import Tensor


def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """|velocity - target|^2 per sample: (B, C, H, W) -> (B,), the mean over each sample's values, in float32."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)
