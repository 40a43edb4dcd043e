"""What a VAE is made of: the public shapes, and how the kinds of VAE differ.

C below is `latent_channels(vae)`, and H / h is `downsampling(vae)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import InputError

# f8d4 is the shape of SD-VAE; f16d32 that of VA-VAE and IN-VAE; f4d4-tiny is ours, for small images and laptops.
vae_models: dict[str, dict] = {
    "f8d4": {
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 256,
    },
    "f16d32": {
        "latent_channels": 32,
        "block_out_channels": [128, 128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 256,
    },
    "f4d4-tiny": {
        "latent_channels": 4,
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
    },
}

# More shapes that are published as files with LDM keys, all from code whose norms have 32 groups; for "auto" alone.
public_shapes: dict[str, dict] = vae_models | {
    "kl-f4": vae_models["f8d4"]
    | {
        "latent_channels": 3,
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "kl-f16": vae_models["f16d32"] | {"latent_channels": 16},
    "kl-f32": vae_models["f16d32"]
    | {
        "latent_channels": 64,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2 + ["UpDecoderBlock2D"] * 4,
    },
    "FLUX.1 and SD3": vae_models["f8d4"]
    | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
}

# The architecture that shapes and names of tensors do not show.
UNSEEN = ("norm_num_groups", "act_fn")


# What a configuration says beside the network: the size it was trained at, and how its latents and numbers are scaled.
_BESIDE = ("sample_size", "scaling_factor", "shift_factor", "force_upcast")


# The kinds


@dataclass(frozen=True)
class Kind:
    """How the VAEs of a class of diffusers are used.

    Attributes:
        latent_channels, downsampling, image_channels: of a configuration.
        encode: VAE and pixels [-1, 1] (B, 3, H, W) -> mean and log-variance (B, 2C, h, w).
        decode: VAE and latents (B, C, h, w) -> pixels, about [-1, 1], (B, 3, H, W).
        statistics: mean and standard deviation of the latents that the VAE itself carries, each (C,); None: none.
        why_frozen: why it cannot be trained here; None: it can.
    """

    latent_channels: Callable[[Mapping], int]
    downsampling: Callable[[Mapping], int]
    image_channels: Callable[[Mapping], tuple[int, int]]
    encode: Callable[[nn.Module, Tensor], Tensor]
    decode: Callable[[nn.Module, Tensor], Tensor]
    statistics: Callable[[nn.Module], tuple[Tensor, Tensor] | None]
    why_frozen: str | None = None


def _kl_encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    hidden = vae.encoder(pixels)
    return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


def _kl_decode(vae: nn.Module, z: Tensor) -> Tensor:
    return vae.decoder(z if vae.post_quant_conv is None else vae.post_quant_conv(z))


def _config_statistics(vae: nn.Module) -> tuple[Tensor, Tensor] | None:
    if vae.config.get("latents_mean") is None or vae.config.get("latents_std") is None:
        return None
    # In float64, so that 1 / std gives the scale back that models/vae_files.py wrote.
    return tuple(torch.tensor(vae.config[name], dtype=torch.float64) for name in ("latents_mean", "latents_std"))


def _levels_factor(config: Mapping) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


# FLUX.2: the latents that its transformer sees are 2 x 2 patches of the autoencoder's, (4c + 2y + x, h, w), normalised
# by a BatchNorm that lies in the VAE (diffusers' Flux2Pipeline).


def _flux2_encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    mean, logvar = _kl_encode(vae, pixels).chunk(2, dim=1)
    return torch.cat([F.pixel_unshuffle(half, vae.config.patch_size[0]) for half in (mean, logvar)], dim=1)


def _flux2_decode(vae: nn.Module, z: Tensor) -> Tensor:
    return _kl_decode(vae, F.pixel_shuffle(z, vae.config.patch_size[0]))


def _flux2_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    return vae.bn.running_mean.double(), (vae.bn.running_var.double() + vae.bn.eps).sqrt()


# Qwen-Image: a video's VAE on one frame, (B, C, 1, h, w).


def _qwen_encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    return vae.encode(pixels[:, :, None]).latent_dist.parameters[:, :, 0]


def _qwen_decode(vae: nn.Module, z: Tensor) -> Tensor:
    return vae.decode(z[:, :, None]).sample[:, :, 0]


_KL = Kind(
    latent_channels=lambda config: config["latent_channels"],
    downsampling=_levels_factor,
    image_channels=lambda config: (config.get("in_channels", 3), config.get("out_channels", 3)),
    encode=_kl_encode,
    decode=_kl_decode,
    statistics=_config_statistics,
)
_FLUX2 = Kind(
    latent_channels=lambda config: config["latent_channels"] * config["patch_size"][0] ** 2,
    downsampling=lambda config: _levels_factor(config) * config["patch_size"][0],
    image_channels=_KL.image_channels,
    encode=_flux2_encode,
    decode=_flux2_decode,
    statistics=_flux2_statistics,
    why_frozen="checkpoints hold a VAE's LDM keys, which have no place for its BatchNorm",
)
_QWEN = Kind(
    latent_channels=lambda config: config["z_dim"],
    downsampling=lambda config: 2 ** (len(config["dim_mult"]) - 1),
    image_channels=lambda config: (config["input_channels"],) * 2,
    encode=_qwen_encode,
    decode=_qwen_decode,
    statistics=_config_statistics,
    why_frozen="its convolutions over time get no gradient from single images, and it has no LDM keys for a checkpoint",
)
kinds: dict[type, Kind] = {AutoencoderKL: _KL, AutoencoderKLFlux2: _FLUX2, AutoencoderKLQwenImage: _QWEN}
kinds_by_name: dict[str, type] = {network.__name__: network for network in kinds}


def kind_of(vae: nn.Module) -> Kind:
    return kinds.get(type(vae), _KL)


def latent_channels(vae: nn.Module) -> int:
    """Channels C of the latents."""
    return kind_of(vae).latent_channels(vae.config)


def downsampling(vae: nn.Module | Mapping) -> int:
    """Pixels per latent position along one side, of a VAE or of an AutoencoderKL's configuration."""
    return _KL.downsampling(vae) if isinstance(vae, Mapping) else kind_of(vae).downsampling(vae.config)


def latent_shape(vae: nn.Module, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images with this side.

    Raises:
        InputError: the VAE does not divide the resolution.
    """
    factor = downsampling(vae)
    if resolution % factor:
        raise InputError(f"--resolution: {resolution} was given; a multiple of {factor} is needed by this VAE")
    return latent_channels(vae), resolution // factor, resolution // factor


def require_trainable(vae: nn.Module, flag: str = "--vae-ckpt") -> None:
    """Refuse to train a VAE of a kind that can only be used as it is.

    Raises:
        InputError: with the reason.
    """
    if why := kind_of(vae).why_frozen:
        advice = "cache_latents.py and train_ldm_only.py take it frozen"
        raise InputError(f"{flag}: an {type(vae).__name__} cannot be trained here: {why}; {advice}")


# Configurations


def require_modest(config: Mapping, what: str) -> None:
    """Refuse a configuration of more modules than any VAE has: to make them, even without weights, fills the memory.

    Raises:
        InputError: more than 16 levels, or more than 16 blocks in a level.
    """
    for name, value in config.items():
        is_count = name in ("layers_per_block", "num_res_blocks") and isinstance(value, int | float)
        is_list = not name.startswith("latents_") and isinstance(value, list | tuple)
        if (is_count and value > 16) or (is_list and len(value) > 16):
            raise InputError(f"{what}: {name} asks for more than 16 levels or blocks, as no VAE has")


def build_vae(config: str | Mapping) -> AutoencoderKL:
    """An AutoencoderKL with fresh weights, drawn from torch's global generator.

    Args:
        config: a name in `public_shapes`, or a configuration as `vae_config` returns it.
    """
    return AutoencoderKL.from_config(dict(public_shapes[config] if isinstance(config, str) else config))


def vae_config(vae: nn.Module) -> dict:
    """The architecture as a plain dict of JSON values, enough for `build_vae` to make an AutoencoderKL again.

    `latents_mean` and `latents_std` are left out: they are statistics of particular weights, which training changes.
    The class is in it where it is another.
    """
    named = {} if type(vae) is AutoencoderKL else {"_class_name": type(vae).__name__}
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return named | {key: value for key, value in config.items() if key not in ("latents_mean", "latents_std")}


def require_same_network(vae: nn.Module, arch: str, what: str, wanted: str) -> None:
    """Refuse an AutoencoderKL that computes something else than the preset `arch`.

    Raises:
        InputError: the first difference.
    """
    with torch.device("meta"):
        ours = vae_config(build_vae(arch))
    theirs = vae_config(vae)
    for key in ours:
        if key not in _BESIDE and ours[key] != theirs.get(key):
            raise InputError(f"{what} has {key} {theirs.get(key)}; {wanted} has {ours[key]}: 'auto' takes the folder's")
