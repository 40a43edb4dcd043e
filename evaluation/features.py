"""Feature spaces of evaluation: Inception (FID and its kin), DINOv2 (FD-DINOv2), or any of our encoders.

A feature network maps images uint8 (B, 3, H, W) to (pooled (B, D), spatial (B, S) or None), float32, and has `label`,
which names its numbers, `dim` = D and `spatial_dim` = S (0 without spatial features).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.inception import load_inception
from models.encoder_table import ENCODERS
from models.encoder_weights import find_weights, load_weights, read_weights
from models.encoders import build, load_encoder
from utils.errors import InputError, about, renamed

STEIN_SIZE = 224  # pixels of DINOv2's input in Stein et al. 2023 (arXiv 2306.04675)
NAMES = {"--enc-type": "--features", "--resolution: ": "--features: images with a side of "}  # the encoders' and ours
PROBE_TOLERANCE = 1e-2  # relative; machines differ by 1e-5, other weights by about 1


def load_features(name: str, size: tuple[int, int], *, weights: str | Path | None = None) -> nn.Module:
    """A frozen feature network, on the CPU. torch's global random state is left as it was.

    Args:
        name: "inception"; "dinov2-vit-{b,l,g}": its class token, as FD-DINOv2 takes it; any other name that
            `--enc-type` takes: the mean of its patch tokens, labelled so.
        size: height and width of the images (encoders need squares).
        weights: its weights file, where that is not at the usual place.
    Raises:
        InputError: unknown name, absent or foreign weights, a size that the encoder cannot take.
    """
    if name == "inception":
        with about("--inception-weights"):
            return load_inception(weights)
    if name not in ENCODERS and not name.startswith("timm:"):
        raise InputError(f"--features: {name!r} was given; choose from inception, {', '.join(ENCODERS)}, timm:NAME")
    if size[0] != size[1]:
        raise InputError(f"--features: {name} needs square images; they are {size[0]} x {size[1]}")
    weights = None if weights is None else str(weights)
    with renamed(NAMES), torch.random.fork_rng(devices=[]):  # timm draws weights before it reads them
        if name.startswith("dinov2-vit-"):
            return DINOv2ClassToken(name, weights)
        return MeanToken(name, size[0], weights)


class DINOv2ClassToken(nn.Module):
    """The class token of DINOv2 at 224 x 224: with ViT-L the space of FD-DINOv2 (Stein et al. 2023; EDM2).

    Both the resizing and the position table are those of the original DINOv2 code, not those of the alignment encoder.
    """

    spatial_dim = 0

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        spec = ENCODERS[name]
        self.label, self.dim = name, spec.width
        self.network = build(spec, STEIN_SIZE // spec.patch * 16)  # 16 pixels of the run are a patch of 14
        path = find_weights(spec, weights)
        with about("--enc-ckpt" if weights else "--features"):
            load_weights(self.network, spec, path)

        # `load_weights` resampled the positions as the alignment encoder has them; here DINOv2's own way counts.
        positions = read_weights(path)["pos_embed"]
        self.network.pos_embed.data = dinov2_positions(positions.float(), STEIN_SIZE // spec.patch)
        for key, values in zip(("mean", "std"), spec.mean_std, strict=True):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        pixels = F.interpolate(images.float(), size=(STEIN_SIZE, STEIN_SIZE), mode="bicubic", antialias=True) / 255
        return self.network.forward_features((pixels - self.mean) / self.std)[:, 0], None  # (B, D)


def dinov2_positions(positions: Tensor, grid: int) -> Tensor:
    """Position table (1, 1 + M * M, F) resampled to (1, 1 + grid * grid, F) as DINOv2's own code does.

    It adds 0.1 to the grid before taking the scale (`interpolate_offset`), which shifts every position a little.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    planes = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, F, M, M)
    planes = F.interpolate(planes, scale_factor=(grid + 0.1) / side, mode="bicubic")
    return torch.cat([token, planes.flatten(2).transpose(1, 2)], dim=1)


class MeanToken(nn.Module):
    """The mean of an encoder's patch tokens, as the alignment loss sees them."""

    spatial_dim = 0

    def __init__(self, name: str, resolution: int, weights: str | None = None):
        super().__init__()
        self.encoder = load_encoder(name, resolution=resolution, checkpoint=weights)
        self.label = f"{Path(name.rsplit(':', 1)[-1]).name}-mean-tokens"
        self.dim = self.encoder.embed_dim

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.encoder(images).mean(1), None  # (B, D)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32, no choice among convolution algorithms: numbers that repeat."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    cudnn.deterministic = True
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


def probe(network: nn.Module, size: tuple[int, int], device: torch.device) -> Tensor:
    """Features (D,) of one fixed image: what tells this network and its weights from another."""
    channel, row, column = torch.meshgrid(*(torch.arange(n) for n in (3, *size)), indexing="ij")
    image = (7 * row + 5 * column + 29 * channel + (row * column) // 12) % 256
    with exact_float32(device):
        return network(image.to(device, torch.uint8)[None])[0][0].cpu()


def same_network(probe_1: Tensor, probe_2: Tensor) -> bool:
    """Whether two probes are of one network, up to rounding."""
    if probe_1.shape != probe_2.shape:
        return False
    return bool((probe_1 - probe_2).abs().max() <= PROBE_TOLERANCE * probe_1.abs().max())
