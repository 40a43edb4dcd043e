"""What a block of LightningDiT (Yao et al. 2025, arXiv 2501.01423) has in place of a SiT block's parts.

State-dict names are those of the public checkpoints (`feat_rope.freqs_cos`, `blocks.N.mlp.w12` ...).  Shapes below:
B batch, N tokens, D hidden width, h width of a head.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a weight; float32 inside, also of half inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """The gated MLP, SiLU(a) * b of two projections (arXiv 2002.05202): tokens (..., D) -> (..., D).

    Args:
        width: of D's MLP without a gate; two thirds of it, cut off, give the gated one as many parameters.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        width = int(2 / 3 * width)
        self.w12 = nn.Linear(hidden_size, 2 * width)
        self.w3 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RotaryAttention(Attention):
    """Attention whose queries and keys are turned by the positions of their tokens (RoPE, arXiv 2104.09864)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens x (B, N, D) -> (B, N, D); cos and sin (N, h) are those of `RotaryPositions`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, h) each
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (self.scale * q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (a, b) to (a cos - b sin, b cos + a sin): x (..., N, h)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class RotaryPositions(nn.Module):
    """The tables `freqs_cos` and `freqs_sin` (N, h) of a square grid of tokens, row by row.

    The first half of a head's channels turns with the row, the second with the column.

    Raises:
        ValueError: 4 does not divide the width of a head.
    """

    def __init__(self, head_width: int, grid: int):
        super().__init__()
        if head_width % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 channels, not {head_width}")
        frequencies = 10000 ** -(torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
        angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies.repeat_interleave(2)  # (grid, h / 2)
        rows, columns = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, h)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())
