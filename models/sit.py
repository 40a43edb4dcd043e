"""SiT: the scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740), with REPA's projectors
(Yu et al. 2024, arXiv 2410.06940) and REPA-E's normaliser of the latents (arXiv 2504.10483, section 3); and
LightningDiT, which is a SiT of other blocks.

State-dict names are those of the public checkpoints (`x_embedder.proj`, `y_embedder.embedding_table`, `blocks.N.attn`,
`projectors.N`, `bn` ...).  Shapes below: B batch, C latent channels, N tokens, D hidden width, F encoder width.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.lightning import RMSNorm, RotaryAttention, RotaryPositions, SwiGLU
from models.projectors import build_projector
from utils.distributed import all_sum, world_size
from utils.errors import InputError
from utils.modules import compile_forward

# Depth, width and heads of each size. The public code names S but cannot run it; T is ours, for laptops and tests.
SIT_SIZES = {
    "T": dict(depth=6, hidden_size=192, num_heads=3, projector_dim=512),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}


class SiT(nn.Module):
    """A transformer that predicts the velocity of noised latents, and projects its tokens to encoder widths.

    Args:
        input_size: side of the latents; `patch_size` divides it.
        patch_size: side of a token's patch.
        in_channels: latent channels C.
        hidden_size: token width D.
        encoder_depth: tokens after this many blocks (1..depth) go to the projectors.
        depth: number of blocks.
        num_heads: attention heads; divides D.
        mlp_ratio: width of a block's MLP over D.
        class_dropout_prob: > 0 gives the label embedding a null row (index `num_classes`). Dropping itself is the
            caller's: see `drop` of `forward`.
        num_classes: labels lie in [0, num_classes).
        z_dims: width F of each encoder to align with; one projector each.
        projector_dim: hidden width of the projectors that have one, "mlp".
        projector: their kind, as `models.projectors` knows them.
        bn_momentum: of the running statistics of the latents' normaliser.
        qk_norm: LayerNorm, or LightningDiT's RMSNorm, on queries and keys of each head.
        fused_attn: torch's scaled_dot_product_attention instead of explicit softmax.
        learn_pos_embed: whether the sin-cos position table takes part in training. The public REPA-E training trains
            it (its unfreezing of "all parameters" includes the table), the public LDM-only training does not; results
            of both are reproduced only so.
        decoder_hidden_size: width of the last layer in public configurations; must equal `hidden_size`.
        lightning: LightningDiT's blocks: RMSNorm, SwiGLU, and rotary positions beside the table.

    Attributes:
        grad_checkpoint: whether the backward pass computes each block's activations again instead of keeping them.
    """

    grad_checkpoint = False

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        encoder_depth: int = 8,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        z_dims: list[int] | tuple[int, ...] = (768,),
        projector_dim: int = 2048,
        bn_momentum: float = 0.1,
        qk_norm: bool = False,
        fused_attn: bool = True,
        learn_pos_embed: bool = False,
        decoder_hidden_size: int | None = None,
        projector: str = "mlp",
        lightning: bool = False,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide latents of {input_size} x {input_size}")
        if not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder depth {encoder_depth} is outside 1..{depth}")
        if decoder_hidden_size not in (None, hidden_size):
            raise ValueError(f"decoder_hidden_size {decoder_hidden_size} differs from hidden_size {hidden_size}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.encoder_depth = encoder_depth
        self.null_label = num_classes if class_dropout_prob > 0 else None

        # Latents to tokens with positions; time and label to the vector that conditions every block.
        self.grid = input_size // patch_size  # tokens per side
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, self.grid), requires_grad=learn_pos_embed)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, strict_img_size=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        self.feat_rope = RotaryPositions(hidden_size // num_heads, self.grid) if lightning else None

        # Tokens to velocity, with REPA's projectors on the way.
        options = dict(qk_norm=qk_norm, fused_attn=fused_attn, lightning=lightning)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth))
        self.projectors = nn.ModuleList(
            build_projector(projector, hidden_size, projector_dim, width, self.grid) for width in z_dims
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels, lightning=lightning)

        # REPA-E's normaliser of the latents. It stands outside `forward`: see `normalize`.
        self.bn = LatentNorm(in_channels, eps=1e-4, momentum=bn_momentum, affine=False)
        self._initialize()

    def forward(
        self, x_t: Tensor, t: Tensor, labels: Tensor, drop: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Velocity and projections of noised latents.

        Args:
            x_t: (B, C, H, W) noised normalised latents.
            t: (B,) times in [0, 1]; 0 is data, 1 is noise.
            labels: (B,) int64 in [0, num_classes), or the null label.
            drop: (B,) bool; where true the label is replaced by the null label.

        Returns:
            velocity (B, C, H, W), and one (B, N, F) tensor of projections per encoder.
        """
        x, c = self._embed(x_t, t, labels, drop)  # (B, N, D), (B, D)
        projections = []
        for depth, block in enumerate(self.blocks, start=1):
            x = self._through(block, x, c)  # (B, N, D)
            if depth == self.encoder_depth:
                projections = [project(x) for project in self.projectors]  # (B, N, F) each
        patches = self.final_layer(x, c)  # (B, N, patch * patch * C)
        return self._unpatchify(patches), projections

    def project(self, x_t: Tensor, t: Tensor, labels: Tensor) -> list[Tensor]:
        """The projections of `forward` alone: only the first `encoder_depth` blocks run, no label is dropped."""
        x, c = self._embed(x_t, t, labels, None)
        for block in self.blocks[: self.encoder_depth]:
            x = self._through(block, x, c)
        return [project(x) for project in self.projectors]

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents z (B, C, H, W) -> normalised x_0; with batch statistics in training mode, else running ones."""
        return self.bn(z)

    @torch.no_grad()
    def set_latent_stats(self, scale: Tensor, bias: Tensor) -> None:
        """Start the normaliser from the statistics stored with a VAE: scale = 1/std and bias = mean, (1, C, 1, 1)."""
        self.bn.running_mean.copy_(bias.flatten())
        self.bn.running_var.copy_(scale.flatten().pow(-2))

    def latent_stats(self) -> tuple[Tensor, Tensor]:
        """scale = rsqrt(running variance), without eps as in public files, and bias = running mean; (1, C, 1, 1)."""
        scale, bias = self.bn.running_var.rsqrt(), self.bn.running_mean.clone()
        return scale.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)

    def compile_blocks(self) -> None:
        """Compile the blocks, which `forward` and `project` then share; see `utils.modules.compile_forward`."""
        compile_forward(*self.blocks)

    def _through(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        rope = () if self.feat_rope is None else (self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, c, *rope, use_reentrant=False, preserve_rng_state=False)  # it draws nothing
        return block(x, c, *rope)

    def _embed(self, x_t, t, labels, drop):
        """Tokens (B, N, D) with positions, and the conditioning vector (B, D)."""
        if drop is not None:
            labels = torch.where(drop, self.null_label, labels)
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.y_embedder(labels)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Patches of velocity (B, N, p * p * C) -> (B, C, H, W)."""
        p, g = self.patch_size, self.grid
        x = x.reshape(x.shape[0], g, g, p, p, self.in_channels)  # rows and columns of tokens, then within a patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_channels, g * p, g * p)

    def _initialize(self) -> None:
        """SiT's (and DiT's) initialisation: Xavier everywhere, then zero for what must start as the identity."""
        # Xavier for linear layers, of which the patch embedding, written as a convolution, is one.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)

        # Small conditioning at first.
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

        # adaLN-Zero: gates of 0 make every block the identity, and the last layer's zeros make the velocity 0.
        modulations = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class SiTBlock(nn.Module):
    """A transformer block conditioned by adaLN-Zero (DiT, arXiv 2212.09748, section 3.2), or LightningDiT's."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool, fused_attn: bool, lightning=False
    ):
        super().__init__()
        self.norm1, self.norm2 = token_norm(hidden_size, lightning), token_norm(hidden_size, lightning)
        # Newer timm has no default for the norm of queries and keys; public checkpoints hold an affine one, eps 1e-5.
        norm_layer = partial(RMSNorm, eps=1e-6) if lightning else nn.LayerNorm
        attention = RotaryAttention if lightning else Attention
        self.attn = attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=norm_layer)
        self.attn.fused_attn = fused_attn
        mlp = SwiGLU if lightning else partial(Mlp, act_layer=partial(nn.GELU, approximate="tanh"))
        self.mlp = mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, *rope: Tensor) -> Tensor:
        # Shift, scale and gate (B, 1, D) of the attention and of the MLP.
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate_1 * self.attn(modulate(self.norm1(x), shift_1, scale_1), *rope)
        return x + gate_2 * self.mlp(modulate(self.norm2(x), shift_2, scale_2))


class FinalLayer(nn.Module):
    """Tokens -> patches of velocity, (B, N, patch * patch * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, lightning: bool):
        super().__init__()
        self.norm_final = token_norm(hidden_size, lightning)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))


def token_norm(width: int, lightning: bool) -> nn.Module:
    """The norm of tokens that adaptive shift and scale follow."""
    return RMSNorm(width, eps=1e-6) if lightning else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine part of adaptive layer norm: tokens x (B, N, D), shift and scale (B, 1, D)."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Times (B,) -> (B, D): 256 sinusoids of t itself (in [0, 1], not of 1000 t), then an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 128):
        super().__init__()
        into, out = nn.Linear(2 * num_frequencies, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(into, nn.SiLU(), out)
        self.register_buffer("frequencies", time_frequencies(num_frequencies), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def time_frequencies(count: int = 128) -> Tensor:
    """Of the sinusoids of a time, (count,), from 1 down to about 1 / 10000."""
    exponents = torch.arange(count, dtype=torch.float32) / count
    return torch.exp(-math.log(10000) * exponents)


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D)."""

    def __init__(self, rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class LatentNorm(nn.BatchNorm2d):
    """BatchNorm of the latents (REPA-E, section 3), whose batch statistics are those of all processes together.

    It follows the VAE as training moves it: batch statistics while SiT learns, running ones for the VAE's alignment and
    for sampling. (torch's SyncBatchNorm refuses CPU tensors.) Statistics are computed in float64, so that the number of
    processes changes them by no more than the last float32 bit, and outside autocast. Across processes no gradient
    flows through the statistics: in REPA-E the latents are detached wherever batch statistics are used.
    """

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if not self.training:
                return F.batch_norm(z, self.running_mean, self.running_var, eps=self.eps)
            mean, var, count = self.batch_statistics(z)

            # Running statistics, as torch's BatchNorm moves them: of the variance, the unbiased estimate. One batch
            # that is not finite would spoil them for good: it leaves them as they are.
            with torch.no_grad():
                unbiased = var.detach() * (count / (count - 1))
                for running, value in ((self.running_mean, mean.detach()), (self.running_var, unbiased)):
                    value = value.float()
                    running.lerp_(value.where(value.isfinite(), running), self.momentum)
                self.num_batches_tracked += 1

            # The batch itself is normalised by the biased one.
            scale = (var + self.eps).rsqrt()
            return ((z - mean.float().view(1, -1, 1, 1)) * scale.float().view(1, -1, 1, 1)).float()

    @staticmethod
    def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor, int]:
        """Per-channel mean and biased variance (C,) in float64 over all processes, and the number of values."""
        values = z.double()
        count = world_size() * (z.numel() // z.shape[1])  # every process has an equal share of the batch

        def mean_over_all(x: Tensor) -> Tensor:
            total = x.sum(dim=(0, 2, 3))
            if world_size() > 1:
                assert not total.requires_grad, "batch statistics of several processes carry no gradient: detach z"
                all_sum(total)
            return total / count

        mean = mean_over_all(values)
        return mean, mean_over_all((values - mean.view(1, -1, 1, 1)).square()), count


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-d sin-cos table (1, grid * grid, width) of MAE and DiT: first half columns, second half rows."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns, rows = axis[None, :, :].expand(grid, -1, -1), axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def build_sit(model: str, latent_shape: tuple[int, int, int], *, encoder_depth: int, **config) -> SiT:
    """A preset for latents (C, h, w), with `config` for the rest of `SiT`'s arguments.

    Raises:
        InputError: the preset does not fit; the message names the flag.
    """
    channels, height, width = latent_shape
    size, patch_size = model.partition("-")[2].split("/")
    if height != width or height % int(patch_size):
        raise InputError(f"--model: {model} was given, whose patch does not divide latents of {height} x {width}")
    depth = SIT_SIZES[size]["depth"]
    if not 1 <= encoder_depth <= depth:
        raise InputError(f"--encoder-depth: {encoder_depth} was given; {model} has blocks 1..{depth}")
    return SiT_models[model](input_size=height, in_channels=channels, encoder_depth=encoder_depth, **config)


def _presets(name: str, sizes: Iterable[str], patches: Iterable[int], **config) -> dict[str, partial]:
    return {
        f"{name}-{size}/{patch}": partial(SiT, patch_size=patch, **SIT_SIZES[size], **config)
        for size in sizes
        for patch in patches
    }


SiT_models = {
    **_presets("SiT", SIT_SIZES, (1, 2, 4, 8)),
    **_presets("LightningDiT", ("T", "B", "L", "XL"), (1, 2), lightning=True),
}
