"""The public frozen encoders, one record each. Adding an encoder is adding a record (see docs/encoders.md).

Facts of each record were found by running the public REPA-E code (arXiv 2504.10483) on the original files. Nothing here
imports torch: widths and grids are known without building anything.
"""

from dataclasses import dataclass

from utils.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of RGB in [0, 1]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXELS_PER_TOKEN = 16  # of the run's images, whatever the patch: at 256 px patch 16 sees 256, patch 14 sees 224
META = "https://dl.fbaipublicfiles.com"


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen encoder: its timm network, its input, its tokens, its public weights file.

    `wrapper` and `prefix` say where the file keeps the encoder (`checkpoint[wrapper][prefix + key]`), `renamed` mends
    misnamed keys, `ignored` names every other key that the file may hold, or, ending in a dot or an underscore, the
    beginning of such keys; any further key is an error.
    """

    name: str
    timm_name: str
    width: int
    depth: int
    heads: int
    patch: int
    file: str  # its name in ckpts/, where the public code looks for it
    url: str | None  # where it is downloaded from, into torch hub's cache under the address's own name
    size_gb: float
    prefix_tokens: int = 1  # class and register tokens, dropped
    final_norm: bool = True  # tokens after the ViT's last LayerNorm, or the bare output of its last block
    eps: float = 1e-6  # of every LayerNorm
    mean_std: tuple = IMAGENET
    resize_first: bool = False  # resize, then normalise (else the other way round)
    wrapper: str | None = None
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    sha256: str | None = None
    cached_as: str | None = None  # where the publisher's own package caches it
    page: str | None = None  # who links to the file, where there is no `url`
    timm_copy: str | None = None  # timm's converted copy on the hub; as a file it is accepted too

    def grid(self, resolution: int) -> int:
        """Tokens per side for images of resolution x resolution; `InputError` unless the grid is whole."""
        if resolution < PIXELS_PER_TOKEN or resolution % PIXELS_PER_TOKEN:
            needed = f"encoder {self.name} needs a multiple of {PIXELS_PER_TOKEN}"
            raise InputError(f"--resolution: {resolution} was given; {needed}")
        return resolution // PIXELS_PER_TOKEN


SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
SHAPES = {"s": (384, 12, 12), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}  # width, depth, heads


def _dinov2(size: str, size_gb: float, registers: bool) -> EncoderSpec:
    reg, reg4 = ("reg", "_reg4") if registers else ("", "")
    file = f"dinov2_vit{size}14{reg4}_pretrain.pth"
    timm_name = f"vit_{SIZES[size]}_patch14{reg4}_dinov2"
    return EncoderSpec(f"dinov2{reg}-vit-{size}", timm_name, *SHAPES[size], 14,
                       file, f"{META}/dinov2/dinov2_vit{size}14/{file}", size_gb, prefix_tokens=5 if registers else 1,
                       timm_copy=f"timm/{timm_name}.lvd142m")  # fmt: skip


def _mocov3(size: str, url: str | None, size_gb: float, **options) -> EncoderSpec:
    return EncoderSpec(
        f"mocov3-vit-{size}", f"vit_{SIZES[size]}_patch16_224", *SHAPES[size], 16,
        f"mocov3_vit{size}.pth", url, size_gb, wrapper="state_dict", prefix="module.base_encoder.",
        ignored=("epoch", "arch", "optimizer", "module.momentum_encoder.", "module.predictor.",
                 "module.base_encoder.head.", "module.base_encoder.fc."),
        **options,
    )  # fmt: skip


# The public ViT-L file of MoCo v3 has numbered the modules of two blocks.
_MOCOV3_L_RENAMED = (
    ("blocks.13.norm13.", "blocks.13.norm1."),
    ("blocks.13.mlp.fc13.", "blocks.13.mlp.fc1."),
    ("blocks.14.norm14.", "blocks.14.norm2."),
    ("blocks.14.mlp.fc14.", "blocks.14.mlp.fc2."),
)
_CLIP_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

ENCODERS: dict[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        _dinov2("b", 0.35, registers=False),
        _dinov2("l", 1.22, registers=False),
        _dinov2("g", 4.55, registers=False),
        _dinov2("b", 0.35, registers=True),
        _dinov2("l", 1.22, registers=True),
        _dinov2("g", 4.55, registers=True),
        EncoderSpec(
            "dinov1-vit-b", "vit_base_patch16_224", *SHAPES["b"], 16, "dinov1_vitb.pth",
            f"{META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", 0.34,
            timm_copy="timm/vit_base_patch16_224.dino",
        ),
        _mocov3("s", f"{META}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", 0.7),
        _mocov3("b", f"{META}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", 1.7),
        _mocov3("l", None, 1.2, renamed=_MOCOV3_L_RENAMED, page="https://github.com/LTH14/rcg"),
        EncoderSpec(
            "clip-vit-L", "vit_large_patch14_clip_quickgelu_224", *SHAPES["l"], 14, "ViT-L-14.pt",
            f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-L-14.pt", 0.93, sha256=_CLIP_SHA256,
            final_norm=False, eps=1e-5, mean_std=CLIP, resize_first=True,
            # the text tower, three numbers that the archive stores as tensors, and the image projection
            ignored=("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
                     "logit_scale", "input_resolution", "context_length", "vocab_size", "visual.proj"),
            cached_as="~/.cache/clip/ViT-L-14.pt", timm_copy="timm/vit_large_patch14_clip_224.openai",
        ),
        EncoderSpec(
            "jepa-vit-h", "vit_huge_patch14_gap_224", 1280, 32, 16, 14, "ijepa_vith.pth",
            f"{META}/ijepa/IN1K-vit.h.14-300e.pth.tar", 10.4, prefix_tokens=0, wrapper="encoder", prefix="module.",
            ignored=("predictor", "target_encoder", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr"),
        ),
        EncoderSpec(
            "mae-vit-l", "vit_large_patch16_224", *SHAPES["l"], 16, "mae_vitl.pth",
            f"{META}/mae/pretrain/mae_pretrain_vit_large.pth", 1.2, final_norm=False, wrapper="model",
            ignored=("mask_token", "decoder_"), timm_copy="timm/vit_large_patch16_224.mae",
        ),
    )
}  # fmt: skip


def encoder_names() -> list[str]:
    """Names that `--enc-type` takes, besides `timm:NAME` and None."""
    return list(ENCODERS)
