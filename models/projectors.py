"""From SiT's tokens to the width of an encoder's: the heads of REPA (arXiv 2410.06940) and iREPA (arXiv 2512.10794)."""

from torch import Tensor, nn

PROJECTORS = {"mlp": None, "conv1": 1, "conv3": 3}  # kinds of projection heads, and the kernels of convolutions


def build_projector(kind: str, hidden_size: int, projector_dim: int, width: int, grid: int) -> nn.Module:
    """A head for tokens of a square grid, (B, N, D) -> (B, N, F): REPA's three linear layers, or iREPA's convolution.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"projector {kind!r} is unknown: {', '.join(PROJECTORS)} are known")
    if kind != "mlp":
        return ConvProjector(hidden_size, width, PROJECTORS[kind], grid)
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, width),
    )


class ConvProjector(nn.Module):
    """iREPA's projection head: one convolution over the grid of tokens.

    Args:
        kernel_size: odd; the border is padded with zeros.
        rows: of the grid, whose tokens come row by row.
    """

    def __init__(self, hidden_size: int, width: int, kernel_size: int, rows: int):
        super().__init__()
        self.rows = rows
        self.projection_layer = nn.Conv2d(hidden_size, width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        planes = x.transpose(1, 2).unflatten(2, (self.rows, -1))  # (B, D, rows, columns)
        return self.projection_layer(planes).flatten(2).transpose(1, 2)  # (B, N, F)
