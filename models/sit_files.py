"""SiT's weights as they are found: ours, REPA's, the original SiT's and LightningDiT's; with other projectors, or for
another grid.

The original SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423) have their time the other way round, s = 1 - t,
and so the opposite velocity; the original SiT's last layer has C channels more, which nothing reads. All is mended in
the weights, once, when they are read: samplers and losses know one convention.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.lightning import RotaryPositions
from models.projectors import PROJECTORS
from models.sit import SIT_SIZES, SiT, sincos_positions, time_frequencies
from utils.errors import InputError
from utils.modules import load_strictly

PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
FIRST_KEY = "x_embedder.proj.weight"
LAST_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")
TIME_WEIGHT = "t_embedder.mlp.0.weight"
TABLE = "y_embedder.embedding_table.weight"
SWIGLU = "blocks.0.mlp.w12.weight"  # LightningDiT's, and no other SiT's
ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
# Axes of the tensors whose shapes tell a SiT's.
_AXES = {
    FIRST_KEY: 4,
    "pos_embed": 3,
    TABLE: 2,
    TIME_WEIGHT: 2,
    "blocks.0.mlp.fc1.weight": 2,
    SWIGLU: 2,
    **dict.fromkeys(ROTARY, 2),
    "blocks.0.attn.q_norm.weight": 1,
    LAST_LAYER[0]: 2,
    LAST_LAYER[1]: 1,
    "bn.running_mean": 1,
    "bn.running_var": 1,
}
_AXES_OF_PROJECTORS = {"0.weight": 2, "4.weight": 2, "projection_layer.weight": 4}  # projectors.<number>.<name>


def find_sit_state(contents: Mapping, path: str | Path, *, ema: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a SiT, in our names and conventions, out of what a file holds.

    Args:
        contents: a training checkpoint with `ema` and `model` (of LightningDiT's, one of them), or a bare state dict.
        path: the file, for messages.
        ema: the moving average, else the raw weights.

    Returns:
        the state dict; and notes on what was taken for what.

    Raises:
        InputError: no SiT, or one whose direction of time nothing tells.
    """
    wanted, notes = "ema" if ema else "model", []
    if "ema" in contents or "model" in contents:
        there = "model" if ema else "ema"
        if ema and "ema" not in contents and _is_public_lightning(_tensors(contents["model"])):
            notes.append(f"{path} holds no 'ema': its 'model' is taken")
            wanted = "model"
        if not isinstance(contents.get(wanted), Mapping):
            raise InputError(f"{path} holds no {wanted!r}, the weights that were asked for, but {there!r}")
        contents = contents[wanted]
    elif not ema:
        raise InputError(f"--no-ema: {path} holds one set of weights, and does not say whether it is an average")
    state = _tensors(contents)
    if FIRST_KEY not in state:
        raise InputError(f"{path} holds no SiT that this code knows (it lacks {FIRST_KEY!r})")
    state = _blocks_in_one_list(state)
    _require_sit(state, path)
    return _in_our_convention(state, path, notes), notes


def _in_our_convention(state: dict[str, Tensor], path: str | Path, notes: list[str]) -> dict[str, Tensor]:
    # Whose is it? Ours has a normaliser, REPA's projectors, the original SiT a wider last layer, LightningDiT a SwiGLU.
    _, channels, patch, _ = state[FIRST_KEY].shape
    if LAST_LAYER[0] not in state:
        raise InputError(f"{path} holds no SiT that this code knows (it lacks {LAST_LAYER[0]!r})")
    rows = state[LAST_LAYER[0]].shape[0]
    if rows == 2 * channels * patch**2:
        if Path(path).name.startswith("DiT"):
            raise InputError(f"{path} is a DiT by its name, which predicts noise and cannot be sampled here")
        for key, width in ((LAST_LAYER[1], rows), (TIME_WEIGHT, 2 * len(time_frequencies()))):
            if key not in state or state[key].shape[-1] != width:
                raise InputError(f"{path} holds no SiT that this code knows (it lacks {key!r} of width {width})")
        turned = "its time and velocity are turned (a DiT has the same tensors, predicts noise, and would give noise)"
        notes.append(f"{path} is taken for the original SiT's, whose t = 1 is data: {turned}")
        return _turned(state, channels, patch)
    if _is_public_lightning(state):
        notes.append(f"{path} is taken for LightningDiT's, whose t = 1 is data: its time and velocity are turned")
        return _turned(state, channels, patch)
    if not any(key.startswith(("bn.", "projectors.")) for key in state):
        needed = "a normaliser (ours), projectors (REPA's) or a last layer of 2 C channels (the original SiT's)"
        raise InputError(f"{path} does not show which way its time runs: {needed} would tell")
    return state


def _tensors(contents: object) -> dict[str, Tensor]:
    """Those of a state dict, under the names that a bare network gives them."""
    state = contents if isinstance(contents, Mapping) else {}
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for prefix in PREFIXES * 2:  # each may be around the other
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_public_lightning(state: Mapping[str, Tensor]) -> bool:
    """A LightningDiT without what ours has beside it."""
    return SWIGLU in state and not any(key.startswith(("bn.", "projectors.")) for key in state)


def _blocks_in_one_list(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old checkpoints of REPA count the blocks after the alignment depth anew, as `decoder_blocks`."""
    first = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    renamed = {}
    for key, value in state.items():
        if match := re.fullmatch(r"decoder_blocks\.(\d{1,3})\.(.*)", key):
            key = f"blocks.{first + int(match[1])}.{match[2]}"
        renamed[key] = value
    return renamed


def _require_sit(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors whose axes or numbers are not those of a SiT, before their shapes are taken for its own."""
    for name in ("blocks", "projectors"):
        numbers = {key.split(".")[1] for key in state if key.startswith(f"{name}.")}
        if numbers != {str(number) for number in range(len(numbers))}:
            raise InputError(f"{path}: the {name} of its SiT are not numbered 0, 1, 2, ...")
    for key, tensor in state.items():
        of_projector = _AXES_OF_PROJECTORS.get(key.split(".", 2)[-1]) if key.startswith("projectors.") else None
        axes = _AXES.get(key, of_projector)
        if axes is not None and (tensor.ndim != axes or 0 in tensor.shape):
            raise InputError(f"{path}: {key} has shape {tuple(tensor.shape)}; {axes} axes are needed")
    if ROTARY[0] in state and "pos_embed" in state:
        _require_rotary(state, path)


def _require_rotary(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tables of rotary positions other than `RotaryPositions`."""
    (tokens, width), hidden = state[ROTARY[0]].shape, state["pos_embed"].shape[2]
    if hidden % width or width % 4:
        raise InputError(f"{path}: {ROTARY[0]} is for heads of {width} channels, which {hidden} do not make")
    for key, table in RotaryPositions(width, math.isqrt(tokens)).state_dict(prefix="feat_rope.").items():
        found = state.get(key, table[:0]).float()
        if found.shape != table.shape or not torch.allclose(found, table, rtol=0, atol=1e-2):  # may be stored in half
            raise InputError(f"{path}: {key} is not the table of rotary positions that this code knows")


def _turned(state: dict[str, Tensor], channels: int, patch: int) -> dict[str, Tensor]:
    """The same network as a function of t = 1 - s, with the velocity dx/dt = -dx/ds in C channels."""
    state = dict(state)
    for key in LAST_LAYER:  # rows are (patch row, patch column, channel)
        rows = state[key].unflatten(0, (patch, patch, -1))
        state[key] = -rows[:, :, :channels].flatten(0, 2)

    # cos(f s) = cos f cos(f t) + sin f sin(f t), and sin(f s) = sin f cos(f t) - cos f sin(f t).
    f = time_frequencies().double()
    of_cos, of_sin = state[TIME_WEIGHT].double().chunk(2, dim=1)
    turned = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    state[TIME_WEIGHT] = turned.to(state[TIME_WEIGHT].dtype)
    return state


def config_of_state_dict(
    state: dict[str, Tensor], *, num_heads: int | None = None, num_classes: int | None = None
) -> dict:
    """The arguments of `SiT` that a state dict fits, read from its tensors' shapes.

    Args:
        state: a SiT state dict, ours or public.
        num_heads: needed only where neither the shapes (qk_norm, rotary positions) nor a preset of this depth and width
            tell.
        num_classes: tells whether the label table's last row is a null row; without it, it is taken for one.

    Raises:
        KeyError: the state dict lacks a tensor that every SiT has.
        ValueError: the number of heads cannot be told.
    """
    hidden, channels, patch, _ = state[FIRST_KEY].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))

    # Heads leave no trace in the shapes, but for what is as wide as one: norms of queries and keys, rotary positions.
    qk_norm, lightning = "blocks.0.attn.q_norm.weight" in state, SWIGLU in state
    if qk_norm:
        num_heads = hidden // state["blocks.0.attn.q_norm.weight"].numel()
    elif lightning:
        num_heads = hidden // state[ROTARY[0]].shape[1]
    if num_heads is None:
        fitting = [s["num_heads"] for s in SIT_SIZES.values() if (s["depth"], s["hidden_size"]) == (depth, hidden)]
        if not fitting:
            raise ValueError(f"no SiT preset has depth {depth} and width {hidden}: the number of heads is unknown")
        num_heads = fitting[0]

    # A null row, if there is one, comes after the rows of the classes.
    rows = state[TABLE].shape[0]
    has_null = num_classes is None or rows == num_classes + 1
    return dict(
        input_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        encoder_depth=1,  # plays no part in sampling
        num_heads=num_heads,
        mlp_ratio=4.0 if lightning else state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        class_dropout_prob=0.1 if has_null else 0.0,
        num_classes=rows - has_null,
        qk_norm=qk_norm,
        lightning=lightning,
        **_projectors_of(state),
    )


def _projectors_of(state: Mapping[str, Tensor]) -> dict:
    """The arguments of `SiT` that its projectors show: how many, their kind and widths."""
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("projectors.")})
    convolution = state.get("projectors.0.projection_layer.weight")
    if convolution is not None:
        kind = f"conv{convolution.shape[2]}"
        if kind not in PROJECTORS:
            raise ValueError(f"its projectors are {kind}; {', '.join(PROJECTORS)} are known")
        widths = [state[f"projectors.{i}.projection_layer.weight"].shape[0] for i in numbers]
        return dict(z_dims=widths, projector=kind)
    widths = [state[f"projectors.{i}.4.weight"].shape[0] for i in numbers]
    return dict(z_dims=widths, projector_dim=state["projectors.0.0.weight"].shape[0] if numbers else 2048)


def latent_stats_of(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and bias (1, C, 1, 1) of the latents, from the normaliser in a state dict; no eps, as in public files.

    Copies: the checkpoint may be memory-mapped.
    """
    mean, var = state["bn.running_mean"].float(), state["bn.running_var"].float()
    return var.rsqrt().view(1, -1, 1, 1), mean.clone().view(1, -1, 1, 1)


def fit_positions(table: Tensor, grid: int) -> Tensor:
    """A position table (1, N, D) for another square grid of tokens, (1, grid * grid, D).

    The sin-cos table is made for the new grid; what training has added to it (REPA-E trains it) is resampled.
    """
    side = math.isqrt(table.shape[1])
    if side == grid:
        return table
    learned = (table.float() - sincos_positions(table.shape[2], side)).transpose(1, 2).unflatten(2, (side, side))
    learned = F.interpolate(learned, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return (sincos_positions(table.shape[2], grid) + learned).to(table.dtype)


def load_sit(sit: SiT, state: Mapping[str, Tensor], what: str) -> list[str]:
    """Load a SiT's weights strictly, but for the grid of tokens, which may be another.

    Returns:
        a note where the position table was made anew.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape == sit.pos_embed.shape:
        load_strictly(sit, state, what)
        return []
    tables = {key: value for key, value in sit.state_dict().items() if key in ROTARY and key in state}
    load_strictly(sit, {**state, **tables, "pos_embed": fit_positions(table, sit.grid)}, what)
    side = math.isqrt(table.shape[1])
    return [f"{what}: its {side} x {side} tokens become {sit.grid} x {sit.grid}; the position table is made for them"]


def start_from(sit: SiT, state: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Start a fresh SiT from a trained one: what the file lacks, or has for other encoders, stays as it is.

    Args:
        state: of `find_sit_state`.

    Returns:
        notes on what stays fresh.

    Raises:
        InputError: another size, latents or number of classes.
    """
    own, notes = sit.state_dict(), []
    _require_same_shape(sit, state, path)
    state = {key: value for key, value in state.items() if not key.startswith("bn.")}  # the VAE's statistics count
    theirs, ours = ({key: x[key].shape for key in x if key.startswith("projectors.")} for x in (state, own))
    if theirs != ours:
        notes.append(
            f"--sit-ckpt: the projectors of {path} are for other encoders, or of another kind: this run's start fresh"
        )
        state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    kept = {key: own[key] for key in own if key.startswith(("bn.", "projectors.")) and key not in state}
    return notes + load_sit(sit, {**kept, **state}, str(path))


def _require_same_shape(sit: SiT, state: Mapping[str, Tensor], path: str | Path) -> None:
    """One line that says what the two networks are, where a list of keys would not help."""
    width, channels, patch, _ = state[FIRST_KEY].shape
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0)
    rows = state[TABLE].shape[0] if TABLE in state else 0
    found = (depth, width, patch, channels, rows)
    needed = (
        len(sit.blocks),
        sit.pos_embed.shape[2],
        sit.patch_size,
        sit.in_channels,
        sit.y_embedder.embedding_table.weight.shape[0],
    )
    if found != needed:
        names = ("blocks", "width", "patch", "latent channels", "rows of the label table")
        apart = [f"{name} {a}, not {b}" for name, a, b in zip(names, found, needed, strict=True) if a != b]
        raise InputError(f"{path} has {'; '.join(apart)}, as --model, --vae and --num-classes need")
