"""Frozen vision encoders: uint8 images -> patch tokens, the targets of the alignment losses.

    images uint8 (B, 3, R, R) -> pixels float32, normalised, S x S -> timm ViT -> tokens (B, N, F), N = grid x grid

The public ones are records of `models.encoder_table`; `timm:NAME` takes any ViT of timm's registry, of the hub
(`timm:hf-hub:ORG/NAME`) or of a folder in timm's format (`timm:local-dir:PATH`).

    python -m models.encoders list
    python -m models.encoders download dinov2-vit-b    # ahead of a run on nodes without network
"""

import logging
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from configs.parsing import ArgumentParser
from models.encoder_table import ENCODERS, EncoderSpec, encoder_names
from models.encoder_weights import download, find_weights, load_weights, read_weights
from utils.errors import InputError, about, command
from utils.modules import compile_forward

logger = logging.getLogger(__name__)

TIMM = "timm:"


class Encoder(nn.Module):
    """A frozen ViT from raw images to its patch tokens: always in eval mode, no gradients.

    Args:
        name: as in `--enc-type`.
        network: a timm ViT with its weights.
        resolution, input_size: side R of the images, side S of what the ViT sees.
        grid: tokens per side; N = grid * grid, row by row.
        embed_dim: width F of a token.
        prefix_tokens: class and register tokens before those of the patches.
        mean_std: of RGB in [0, 1].
        interpolation: from R to S, a mode of torch's `interpolate`.
        resize_first: resize, then normalise; else the other way round.
    Attributes:
        name, resolution, input_size, grid, embed_dim: as given.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        resolution: int,
        input_size: int,
        grid: int,
        embed_dim: int,
        prefix_tokens: int,
        mean_std: tuple,
        interpolation: str = "bicubic",
        resize_first: bool = False,
    ):
        super().__init__()
        self.name, self.embed_dim, self.grid = name, embed_dim, grid
        self.resolution, self.input_size = resolution, input_size
        self.prefix_tokens, self.interpolation, self.resize_first = prefix_tokens, interpolation, resize_first
        self.network = network.requires_grad_(False)
        for key, values in zip(("mean", "std"), mean_std, strict=True):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode, whatever a surrounding module is told."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: the tokens take part in losses that are differentiated
    def forward(self, images: Tensor) -> Tensor:
        """Tokens of a batch, on its device; under autocast the ViT computes in half precision.

        Args:
            images: uint8 (B, 3, R, R).

        Returns:
            float32 (B, N, F), class and register tokens left out.
        """
        side = self.resolution
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, side, side), (images.dtype, images.shape)
        return self.tokens(self.preprocess(images)).float()

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, R, R) -> float32 (B, 3, S, S), in the order of the public code; bicubic overshoot stays."""
        pixels = images.float().div_(255)
        if self.resize_first:
            return self._resize(pixels).sub_(self.mean).div_(self.std)
        return self._resize(pixels.sub_(self.mean).div_(self.std))

    def _resize(self, pixels: Tensor) -> Tensor:
        if self.input_size == self.resolution:
            return pixels
        corners = None if self.interpolation == "nearest" else False
        return F.interpolate(pixels, size=self.input_size, mode=self.interpolation, align_corners=corners)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, N, F) in the precision of the moment."""
        return self.network.forward_features(pixels)[:, self.prefix_tokens :]

    def compile_blocks(self) -> None:
        """Compile a ViT's blocks, and another network of timm all at once; never the preprocessing."""
        if isinstance(self.network, VisionTransformer):
            compile_forward(*self.network.blocks)
        else:
            self.tokens = torch.compile(self.tokens, dynamic=False)


def resize_tokens(tokens: Tensor, grid: int) -> Tensor:
    """Resample a square token grid, bilinearly; the same tokens where the grid is right already.

    Args:
        tokens: (B, N, F), N = side * side, row by row.
        grid: tokens per side that are wanted.

    Returns:
        (B, grid * grid, F); float32 where they were resampled.
    """
    side = math.isqrt(tokens.shape[1])
    assert side * side == tokens.shape[1], f"{tokens.shape[1]} tokens are no square grid"
    if side == grid:
        return tokens
    planes = tokens.float().transpose(1, 2).unflatten(2, (side, side))  # (B, F, side, side)
    return F.interpolate(planes, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def resizing_notes(encoders: list[Encoder], grid: int) -> list[str]:
    """For the log of a run: whose tokens are resampled to SiT's grid."""
    return [
        f"encoder {encoder.name}: its {encoder.grid} x {encoder.grid} tokens are resized to SiT's {grid} x {grid}"
        for encoder in encoders
        if encoder.grid != grid
    ]


# What --enc-type and --enc-ckpt say


def parse_encoder_list(enc_type: str | None, enc_ckpt: str | None = None) -> list[tuple[str, str | None]]:
    """Split the two flags into (name, weights file or None) of each encoder.

    Args:
        enc_type: comma list of names; "None", "" or None for no encoder.
        enc_ckpt: None, or one file for each encoder in the same order; an empty place means that encoder's default.

    Raises:
        InputError: an unknown name, or another number of files than of encoders.
    """
    names = [name.strip() for name in (enc_type or "").split(",")]
    if len(names) == 1 and names[0].lower() in ("", "none"):
        names = []
    for name in names:
        if name not in ENCODERS and not (name.startswith(TIMM) and name != TIMM):
            raise InputError(f"--enc-type: {name!r} was given; choose from {', '.join(ENCODERS)}, timm:NAME, or None")
    files = [file.strip() or None for file in enc_ckpt.split(",")] if enc_ckpt else [None] * len(names)
    if len(files) != len(names):
        needed = f"--enc-type {enc_type} needs {len(names)}, one per encoder"
        raise InputError(f"--enc-ckpt: {len(files)} file(s) were given; {needed}")
    return list(zip(names, files, strict=True))


def encoder_dims(name: str) -> int:
    """Width F of an encoder's tokens; no weights are read.

    Raises:
        InputError: a timm model that does not exist, or that has no tokens.
    """
    return ENCODERS[name].width if name in ENCODERS else _timm_shape(name)[1]


def load_encoders(enc_type: str | None, resolution: int, enc_ckpt: str | None = None) -> list[Encoder]:
    """All encoders of a run, as `--enc-type`, `--resolution` and `--enc-ckpt` name them; see `load_encoder`."""
    return [load_encoder(name, resolution, file) for name, file in parse_encoder_list(enc_type, enc_ckpt)]


def encoders_by_shape(enc_type: str | None, resolution: int, enc_ckpt: str | None = None) -> list[Encoder]:
    """The encoders of `load_encoders` without weights, on the meta device; no weights file is looked for."""
    encoders = []
    for name, _ in parse_encoder_list(enc_type, enc_ckpt):
        if name in ENCODERS:
            encoders.append(_public(ENCODERS[name], build(ENCODERS[name], resolution), resolution))
        else:
            input_size, grid, width = _timm_input(name, resolution)
            network = _timm_model(name, img_size=input_size, meta=True)
            encoders.append(_timm_encoder(name, network, resolution, input_size, grid, width))
    return encoders


def load_encoder(name: str, resolution: int = 256, checkpoint: str | None = None) -> Encoder:
    """A frozen encoder with its public weights, on the CPU.

    Args:
        name: a key of `ENCODERS`, or `timm:NAME`.
        resolution: side of the images that it will be given, in pixels.
        checkpoint: its weights file, where that is not at the usual places.

    Raises:
        InputError: unknown name, a resolution without a whole token grid, weights that are absent or another network's.
    """
    parse_encoder_list(name)  # refuses unknown names
    if name in ENCODERS:
        encoder = _public(ENCODERS[name], load_network(ENCODERS[name], resolution, checkpoint), resolution)
    else:
        encoder = _load_timm(name, resolution, checkpoint)
    grid, width = encoder.grid, encoder.embed_dim
    logger.info("encoder %s: %d x %d tokens of width %d from %d px", name, grid, grid, width, encoder.input_size)
    return encoder


# The public encoders


def _public(spec: EncoderSpec, network: nn.Module, resolution: int) -> Encoder:
    if not spec.final_norm:  # built and loaded with it, so that the file is checked whole
        network.norm = nn.Identity()
    return public_encoder(spec, network, resolution)


def public_encoder(spec: EncoderSpec, network: nn.Module, resolution: int) -> Encoder:
    """The encoder of a record around its network (of `build`, with weights), for images of this resolution."""
    grid = spec.grid(resolution)
    sizes = dict(resolution=resolution, input_size=grid * spec.patch, grid=grid)
    tokens = dict(embed_dim=spec.width, prefix_tokens=spec.prefix_tokens)
    pixels = dict(mean_std=spec.mean_std, resize_first=spec.resize_first)
    return Encoder(spec.name, network, **sizes, **tokens, **pixels)


def load_network(spec: EncoderSpec, resolution: int, checkpoint: str | None = None) -> nn.Module:
    """The encoder's timm ViT with its weights. (Tests put depth-2 networks in this function's place.)"""
    network = build(spec, resolution)
    path = find_weights(spec, checkpoint)
    with about("--enc-ckpt" if checkpoint else "--enc-type"):
        load_weights(network, spec, path)
    logger.info("encoder %s: weights from %s", spec.name, path)
    return network


def build(spec: EncoderSpec, resolution: int, depth: int | None = None) -> nn.Module:
    """The encoder's timm ViT without weights (on the meta device), for images of this resolution.

    Args:
        spec: a record of `ENCODERS`.
        resolution: side of the run's images.
        depth: other number of blocks than the public network's.
    """
    size = dict(img_size=spec.grid(resolution) * spec.patch, depth=depth or spec.depth, num_heads=spec.heads)
    with torch.device("meta"):
        network = timm.create_model(spec.timm_name, pretrained=False, num_classes=0, **size)
    eps = {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)}
    assert eps == {spec.eps}, f"{spec.timm_name} has LayerNorm eps {eps}, {spec.name} was trained with {spec.eps}"
    return network


# Any ViT of timm


def _load_timm(name: str, resolution: int, checkpoint: str | None) -> Encoder:
    """`timm:NAME` with its pretrained weights or a file's; its input is as near to the resolution as its patch lets."""
    input_size, grid, width = _timm_input(name, resolution)
    options = {}
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise InputError(f"--enc-ckpt: {checkpoint} is not a file; the weights of {name} are needed")
        # Built with the file's own classifier, if any, because timm loads strictly only where the classes agree.
        with about("--enc-ckpt"):
            num_classes = _classes_in(checkpoint)
        overlay = {"source": None, "file": checkpoint, "num_classes": num_classes}
        options = {"num_classes": num_classes, "pretrained_cfg_overlay": overlay}
    network = _timm_model(name, img_size=input_size, pretrained=True, **options)
    return _timm_encoder(name, network, resolution, input_size, grid, width)


def _timm_input(name: str, resolution: int) -> tuple[int, int, int]:
    """Side of what a timm ViT sees of images of this resolution; grid and width of the tokens that it gives for it."""
    patch, _ = _timm_shape(name)
    input_size = max(1, round(resolution / patch)) * patch
    return input_size, *_check_tokens(name, _timm_model(name, img_size=input_size, meta=True), input_size)


def _timm_encoder(name: str, network: nn.Module, resolution: int, input_size: int, grid: int, width: int) -> Encoder:
    """The encoder around a timm ViT, with the preprocessing that timm records."""
    network.reset_classifier(0)
    config = network.pretrained_cfg
    interpolation = config["interpolation"] if config["interpolation"] in ("bilinear", "nearest") else "bicubic"
    sizes = dict(resolution=resolution, input_size=input_size, grid=grid)
    tokens = dict(embed_dim=width, prefix_tokens=getattr(network, "num_prefix_tokens", 0))
    pixels = dict(mean_std=(config["mean"], config["std"]), interpolation=interpolation)
    return Encoder(name, network, **sizes, **tokens, **pixels)


def _timm_model(name: str, *, meta: bool = False, **options) -> nn.Module:
    """timm.create_model, its many ways to fail told in one line."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a connection it would announce each of ten retries
    try:
        with torch.device("meta" if meta else "cpu"):
            return timm.create_model(name.removeprefix(TIMM), **options)
    except Exception as error:  # hub, network, files and registry each raise their own
        problem = f"--enc-type: {name} {'was not built' if meta else 'did not get its weights'}: {_one_line(error)}"
        advice = "" if meta else f"; fetch them ahead (python -m models.encoders download {name}) or name --enc-ckpt"
        raise InputError(problem + advice) from error
    finally:
        hub.setLevel(level)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _timm_shape(name: str) -> tuple[int, int]:
    """Pixels per token side, and width, of a timm model, from a pass without data or weights."""
    network = _timm_model(name, meta=True)
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or network.pretrained_cfg["input_size"][-2:]
    grid, width = _check_tokens(name, network, size[0])
    return size[0] // grid, width


def _check_tokens(name: str, network: nn.Module, size: int) -> tuple[int, int]:
    """Grid and width of the tokens, (B, prefix + grid * grid, width); anything else is refused."""
    try:
        with torch.no_grad():
            shape = tuple(network.forward_features(torch.empty(1, 3, size, size, device="meta")).shape)
    except Exception as error:
        raise InputError(f"--enc-type: {name} fails on {size} x {size} RGB images: {_one_line(error)}") from error
    tokens = shape[1] - getattr(network, "num_prefix_tokens", 0)
    if len(shape) != 3 or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise InputError(f"--enc-type: {name} gives features of shape {shape}; a ViT with (B, prefix + N, D) is needed")
    return math.isqrt(tokens), shape[2]


def _classes_in(checkpoint: str) -> int:
    """Rows of the classifier in a timm model's weights file; 0 where there is none."""
    state = read_weights(checkpoint)
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):  # those that timm unwraps, in its order
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    head = state.get("head.weight", state.get("module.head.weight"))
    return 0 if head is None else head.shape[0]


# python -m models.encoders


def list_encoders() -> str:
    """A table of the public encoders: name, width, size of the download, where it comes from."""
    specs = ENCODERS.values()
    return "\n".join(f"{spec.name:<17}{spec.width:>5}{spec.size_gb:>7} GB  {spec.url or spec.page}" for spec in specs)


def _download(name: str) -> Path | str:
    if name in ENCODERS:
        return download(ENCODERS[name])
    parse_encoder_list(name)
    _load_timm(name, 224, None)  # timm keeps its own cache
    return "timm's cache"


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m models.encoders", description="The frozen encoders and their weights.")
    actions = "list the public encoders, or fetch weights ahead of a run"
    parser.add_argument("action", choices=["list", "download"], help=actions)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to download, as in --enc-type")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.action == "list":
        print(list_encoders())
    elif not args.names:
        parser.error(f"download: no name was given; choose from {', '.join(encoder_names())}, timm:NAME")
    for name in args.names:
        print(f"{name}: {_download(name)}")


if __name__ == "__main__":
    main()
