"""The VAE: `diffusers.AutoencoderKL` in the public shapes, loaded strictly from every public form of file.

C below is `vae.config.latent_channels`, and H / h is `downsampling(vae)`.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from models.vae_keys import diffusers_shape, infer_config, key_pairs
from utils.errors import InputError, about
from utils.torch_files import read_torch_file

logger = logging.getLogger(__name__)

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

# What public training checkpoints of VAEs hold beside the VAE: losses, an EMA, VA-VAE's alignment to an encoder.
FOREIGN_PREFIXES = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")


def build_vae(config: str | Mapping) -> AutoencoderKL:
    """A VAE with fresh weights, drawn from torch's global generator.

    Args:
        config: a name in `vae_models`, or a configuration as `vae_config` returns it.
    """
    return AutoencoderKL.from_config(dict(vae_models[config] if isinstance(config, str) else config))


def vae_config(vae: AutoencoderKL) -> dict:
    """The architecture as a plain dict of JSON values, enough for `build_vae` to make the network again.

    `latents_mean` and `latents_std` are left out: they are statistics of particular weights, which training changes.
    """
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return {key: value for key, value in config.items() if key not in ("latents_mean", "latents_std")}


def downsampling(vae: AutoencoderKL | Mapping) -> int:
    """Pixels per latent position along one side, of a VAE or of its configuration."""
    config = vae if isinstance(vae, Mapping) else vae.config
    return 2 ** (len(config["block_out_channels"]) - 1)


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images with this side.

    Raises:
        InputError: the VAE does not divide the resolution.
    """
    factor = downsampling(vae)
    if resolution % factor:
        raise InputError(f"--resolution: {resolution} was given; a multiple of {factor} is needed by this VAE")
    return vae.config.latent_channels, resolution // factor, resolution // factor


# Loading


def load_vae(arch: str, path: str | Path, *, flags: tuple[str, str] = ("--vae", "--vae-ckpt")) -> AutoencoderKL:
    """A VAE with the weights of a file or folder, float32, on the CPU, in eval mode.

    Args:
        arch: a name in `vae_models`; or "auto", which takes the architecture from the diffusers folder, or from the
            shapes of the tensors in a file with LDM keys.
        path: `.pt`, `.pth`, `.ckpt` (also with the weights under "state_dict") or `.safetensors`, with LDM or diffusers
            keys; a diffusers folder (of the VAE, or of a pipeline with one); with "auto" also such a folder's hub name.
        flags: what the messages call the two arguments.

    Raises:
        InputError: nothing there, unreadable, not a VAE, another architecture, a missing or unknown key.
    """
    path, wanted = Path(path), f"{flags[0]} {arch}"
    with about(flags[1]):
        if path.is_dir():
            return _load_folder(path, arch, wanted)
        if path.is_file():
            return vae_from_state(_read_state(path), arch, str(path), wanted)
        if arch == "auto" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
            return _from_pretrained(path)
        public = "`hf download REPA-E/sdvae` (f8d4), REPA-E/e2e-vavae (f16d32)"
        auto = f"{flags[0]} auto {flags[1]} stabilityai/sd-vae-ft-mse"
        raise InputError(f"{path} does not exist; public ones: {public}, or {auto}; see 'VAE' in README.md")


def vae_from_state(state: Mapping, config: str | Mapping, what: str, wanted: str) -> AutoencoderKL:
    """A VAE with exactly the weights of a state dict, float32, on the CPU, in eval mode.

    Args:
        state: LDM or diffusers keys; entries under `FOREIGN_PREFIXES` are dropped and counted in the log.
        config: a name in `vae_models`, "auto" (from the shapes; LDM keys only), or a configuration.
        what, wanted: what the messages call the state dict and the architecture.

    Raises:
        InputError: not a VAE, another architecture, a missing or unknown key.
    """
    state = _own_keys(state, what)
    in_diffusers_keys = any(key.startswith("encoder.down_blocks.") for key in state)
    if config == "auto" and in_diffusers_keys:
        raise InputError(f"{what} does not say its architecture; {wanted} needs the whole diffusers folder")
    if isinstance(config, str):
        config = _config_of(state, what) if config == "auto" else vae_models[config]
    _check_fit(state["decoder.conv_in.weight"].shape[1], _levels(state), config, what, wanted)

    # The network's names of its parameters -> the file's. Every key of either must be one of the other.
    with torch.device("meta"):
        vae = build_vae(config)
    names = {name: (name if in_diffusers_keys else ldm) for ldm, name in key_pairs(vae.config)}
    for key in [key for key in names.values() if key not in state]:
        raise InputError(f"{what} lacks the key {key!r}, which {wanted} needs")
    for key in sorted(state.keys() - set(names.values())):
        raise InputError(f"{what} has the key {key!r}, which {wanted} does not have")

    # Weights in the network's shapes; copies, as the file may be memory-mapped.
    weights = {}
    for name, parameter in vae.named_parameters():
        tensor = diffusers_shape(names[name], state[names[name]])
        if tensor.shape != parameter.shape:
            found, needed = tuple(tensor.shape), tuple(parameter.shape)
            raise InputError(f"{what}: {names[name]!r} has shape {found}; {wanted} needs {needed}")
        weights[name] = tensor.to(torch.float32, copy=True)
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def _read_state(path: Path) -> Mapping:
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is no readable .safetensors file ({error})") from None
    state = read_torch_file(path)
    if isinstance(state.get("state_dict"), Mapping):
        return state["state_dict"]
    if {"ema", "vae"} <= state.keys():
        raise InputError(f"{path} is a whole training checkpoint; take its VAE out with save_vae_weights.py")
    return state


def _own_keys(state: Mapping, what: str) -> dict[str, Tensor]:
    """The VAE's own entries; those of `FOREIGN_PREFIXES` are dropped and counted in the log."""
    for prefix in FOREIGN_PREFIXES:
        if count := sum(str(key).startswith(prefix) for key in state):
            logger.info("%s: %d keys under %r are not the VAE's and were dropped", what, count, prefix)
    own = {key: value for key, value in state.items() if not str(key).startswith(FOREIGN_PREFIXES)}
    if "decoder.conv_in.weight" not in own:
        raise InputError(f"{what} is not the state dict of a VAE: it lacks the key 'decoder.conv_in.weight'")
    for key, value in own.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{what}: {key!r} is a {type(value).__name__}; a tensor is needed")
    return own


def _config_of(state: Mapping[str, Tensor], what: str) -> dict:
    """The preset that the shapes belong to, since shapes do not show the groups of the norms; else what they show."""
    try:
        inferred = infer_config(state)
    except KeyError as error:
        raise InputError(f"{what} is not an LDM autoencoder: it lacks the key {error}") from None
    for preset in vae_models.values():
        if all(inferred[key] == value for key, value in preset.items() if key in inferred):
            return preset
    return inferred


def _levels(state: Mapping[str, Tensor]) -> int:
    """Resolutions that the encoder passes through, each half of the one before; LDM or diffusers keys."""
    matches = [re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _check_fit(channels: int, levels: int, config: Mapping, what: str, wanted: str) -> None:
    if channels != config["latent_channels"]:
        raise InputError(f"{what} has {channels} latent channels; {wanted} needs {config['latent_channels']}")
    if levels != len(config["block_out_channels"]):
        raise InputError(f"{what} downsamples by {2 ** (levels - 1)}; {wanted} needs {downsampling(config)}")


def _load_folder(folder: Path, arch: str, wanted: str) -> AutoencoderKL:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"  # a whole pipeline
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no diffusers folder: a config.json with '_class_name' is needed") from None
    if kind != "AutoencoderKL":
        raise InputError(f"{folder} holds a {kind}; an AutoencoderKL is needed")
    vae = _from_pretrained(folder)
    if arch != "auto":
        levels = len(vae.config["block_out_channels"])
        _check_fit(vae.config["latent_channels"], levels, vae_models[arch], str(folder), wanted)
    return vae


def _from_pretrained(folder: Path) -> AutoencoderKL:
    """A local folder or a hub name through diffusers, but strictly: diffusers itself only warns about wrong keys."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        vae, report = AutoencoderKL.from_pretrained(str(folder), torch_dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # diffusers, the hub and safetensors have no common ancestor
        reason = str(error).split(". ")[0]
        raise InputError(f"{folder} cannot be loaded as a diffusers AutoencoderKL: {reason}") from None
    finally:
        diffusers_logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report[kind]:
            raise InputError(f"{folder}: {kind.replace('_keys', ' key')} {key!r}")
    return vae.eval()


def latent_statistics(
    path: str | Path, vae: AutoencoderKL, *, flag: str = "--vae-ckpt"
) -> tuple[Tensor, Tensor] | None:
    """Stored scale (1 / std) and bias (mean) of the latents, each float32 (1, C, 1, 1); None where none are stored.

    They are looked for in `<name>-latents-stats.pt` beside a file `<name>.pt`, then as `latents_mean` and `latents_std`
    in the configuration of a diffusers folder. The one `scaling_factor` of such a configuration does not count: it is
    no statistic of each channel, and most folders carry the default, which is another VAE's.

    Raises:
        InputError: the stored statistics are unreadable, of another channel count, or not positive and finite.
    """
    # Beside the file, or in the folder's configuration.
    path = Path(path)
    stored = path.with_name(f"{path.stem}-latents-stats.pt")
    if path.is_file() and stored.is_file():
        with about(flag):
            values = read_torch_file(stored)
        if not {"latents_scale", "latents_bias"} <= values.keys():
            raise InputError(f"{flag}: {stored} lacks 'latents_scale' and 'latents_bias'")
        scale, bias = values["latents_scale"], values["latents_bias"]
    elif vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        stored = path
        scale = 1.0 / torch.tensor(vae.config["latents_std"], dtype=torch.float64)
        bias = torch.tensor(vae.config["latents_mean"])
    else:
        return None

    channels = vae.config["latent_channels"]
    scale, bias = (torch.as_tensor(value).float().reshape(1, -1, 1, 1) for value in (scale, bias))
    if scale.shape[1] != channels or bias.shape[1] != channels:
        raise InputError(f"{flag}: {stored} has statistics of {scale.shape[1]} channels; the VAE has {channels}")
    if not (torch.isfinite(scale).all() and torch.isfinite(bias).all() and (scale > 0).all()):
        raise InputError(f"{flag}: {stored} has a latent scale that is not positive, or a value that is not finite")
    return scale, bias
