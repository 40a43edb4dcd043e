"""The VAE: loaded strictly from every form of file in which one is found, with the statistics of its latents."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.vae_architecture import (
    build_vae,
    downsampling,
    kind_of,
    latent_channels,
    latent_shape,
    require_trainable,
    vae_config,
    vae_models,
)
from models.vae_folder import cached_folder, folder_by_shape, hub_folder, load_folder
from models.vae_names import is_hub_name, require_vae
from models.vae_state import (
    Say,
    choose_config,
    config_beside,
    find_state,
    log_line,
    read_contents,
    recorded_config,
    vae_from_state,
)
from utils.errors import InputError, about
from utils.torch_files import read_torch_file

__all__ = [
    "build_vae",
    "downsampling",
    "latent_channels",
    "latent_shape",
    "latent_statistics",
    "load_vae",
    "read_latent_statistics",
    "require_trainable",
    "vae_by_shape",
    "vae_config",
    "vae_from_state",
    "vae_models",
]


def load_vae(
    arch: str, path: str | Path, *, flags: tuple[str, str] = ("--vae", "--vae-ckpt"), say: Say = log_line
) -> AutoencoderKL:
    """A VAE with the weights of a file or folder, float32, on the CPU, in eval mode.

    Args:
        arch: a name in `vae_models`; or "auto", which takes the architecture from the diffusers folder, the training
            checkpoint, the configuration beside the file, or the public shape that the tensors fit exactly.
        path: `.pt`, `.pth`, `.ckpt` or `.safetensors`, with LDM or diffusers keys (`models.vae_state.find_state` says
            where in it), a training checkpoint among them; a diffusers folder (of the VAE, or of a pipeline with one);
            with "auto" also such a folder's hub name (`models.vae_names.is_hub_name`).
        flags: what the messages call the two arguments.
        say: takes a line about each thing that is chosen or left out; by default it is logged, on rank 0.

    Returns:
        the network; from a folder also an AutoencoderKLFlux2 or AutoencoderKLQwenImage, which `models.posterior` uses
        alike and which cannot be trained (`require_trainable`).

    Raises:
        InputError: nothing there, unreadable, not a VAE, another architecture, a missing or unknown key.
    """
    path, wanted = Path(path), f"{flags[0]} {arch}"
    with about(flags[1]):
        vae = _load(path, arch, wanted, flags, say)
        if (channels := kind_of(vae).image_channels(vae.config)) != (3, 3):
            found = f"takes images of {channels[0]} and gives some of {channels[1]} channels"
            raise InputError(f"{path} {found}; RGB is needed")
    return vae


def _load(path: Path, arch: str, wanted: str, flags: tuple[str, str], say: Say) -> AutoencoderKL:
    require_vae(path, arch, flags)
    if path.is_dir():
        return load_folder(path, arch, wanted, say)
    if path.is_file():
        return _load_file(path, arch, wanted, say)
    return load_folder(hub_folder(str(path), say), arch, wanted, say)


def starting_vae(arch: str, path: str, *, say: Say) -> AutoencoderKL:
    """The VAE that joint training starts from: of `load_vae`, or for `none` with fresh weights (REPA-E's table 8).

    Raises:
        InputError: as `load_vae`; one that cannot be trained; fresh weights of no named architecture.
    """
    if path.lower() == "none":
        if arch == "auto":
            raise InputError("--vae: auto was given; with --vae-ckpt none it must name an architecture")
        say(f"--vae-ckpt none: the VAE ({arch}) starts from fresh weights")
        return build_vae(arch)
    vae = load_vae(arch, path, say=say)
    require_trainable(vae)
    return vae


def vae_by_shape(
    arch: str, path: str | Path | None, *, flags: tuple[str, str] = ("--vae", "--vae-ckpt"), say: Say = log_line
) -> AutoencoderKL:
    """The network of `load_vae` without weights, on the meta device. With "auto", what the path names is read for its
    architecture, and nothing is downloaded.

    Raises:
        InputError: "auto", and nothing there says the architecture.
    """
    if arch != "auto":
        if path is not None:
            say(f"{flags[1]} {path} is not read: the network is that of {flags[0]} {arch}")
        with torch.device("meta"):
            return build_vae(arch)
    needed = f"{flags[0]}: auto was given, and {path} is not there to take it from; name an architecture"
    if path is None:
        raise InputError(needed)
    if is_hub_name(str(path)):
        path = cached_folder(str(path)) or path
    path = Path(path)
    with about(flags[1]):
        if path.is_dir():
            return folder_by_shape(path)
        if path.is_file():
            _, config = _state_and_config(path, arch, f"{flags[0]} {arch}", say)
            with torch.device("meta"):
                return build_vae(config)
    raise InputError(needed)


def _load_file(path: Path, arch: str, wanted: str, say: Say) -> AutoencoderKL:
    state, config = _state_and_config(path, arch, wanted, say)
    return vae_from_state(state, config, str(path), wanted)


def _state_and_config(path: Path, arch: str, wanted: str, say: Say) -> tuple[dict[str, Tensor], Mapping]:
    """A file's tensors of the VAE, and the configuration that they belong to."""
    said = []
    contents = read_contents(path, said.append)
    try:
        state = find_state(contents, str(path), said.append)
    except InputError as error:
        raise InputError("; ".join([str(error), *said])) from None  # what was left out may be the reason
    for line in said:
        say(line)
    recorded = recorded_config(contents) or config_beside(path, state, say)
    return state, choose_config(state, arch, recorded, str(path), wanted)


def latent_statistics(
    path: str | Path, vae: AutoencoderKL, *, flag: str = "--vae-ckpt"
) -> tuple[Tensor, Tensor] | None:
    """Stored scale (1 / std) and bias (mean) of the latents, each float32 (1, C, 1, 1); None where none are stored.

    They are looked for in `<name>-latents-stats.pt` (`read_latent_statistics`) beside a file `<name>.pt`, then in the
    VAE itself: `latents_mean`
    and `latents_std` in the configuration of a diffusers folder, or FLUX.2's BatchNorm. The one `scaling_factor` of a
    configuration does not count: it is no statistic of each channel, and most folders carry the default, which is
    another VAE's.

    Raises:
        InputError: the stored statistics are unreadable, of another channel count, or not positive and finite.
    """
    # Beside the file, or in the folder's configuration.
    path = Path(path)
    stored = path.with_name(f"{path.stem}-latents-stats.pt")
    if path.is_file() and stored.is_file():
        with about(flag):
            return read_latent_statistics(stored, vae)
    try:
        of_vae = kind_of(vae).statistics(vae)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # whatever the configuration holds
        raise InputError(f"{flag}: {path} has latent statistics that are no numbers ({error})") from None
    if of_vae is None:
        return None
    with about(flag):
        return _checked_statistics(1.0 / of_vae[1], of_vae[0], path, vae)


def read_latent_statistics(path: str | Path, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Scale and bias of `latent_statistics`, of a file with `latents_scale` and `latents_bias`, or with LightningDiT's
    `mean` and `std`.

    Raises:
        InputError: unreadable, of another channel count, or not positive and finite.
    """
    values = read_torch_file(path)
    if {"mean", "std"} <= values.keys() and isinstance(values["std"], Tensor):
        return _checked_statistics(1.0 / values["std"], values["mean"], path, vae)
    if not {"latents_scale", "latents_bias"} <= values.keys():
        raise InputError(f"{path} lacks 'latents_scale' and 'latents_bias'")
    return _checked_statistics(values["latents_scale"], values["latents_bias"], path, vae)


def _checked_statistics(scale, bias, stored: str | Path, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    if not (isinstance(scale, Tensor) and isinstance(bias, Tensor)):
        raise InputError(f"{stored} has latent statistics that are no tensors")
    channels = latent_channels(vae)
    scale, bias = (value.float().reshape(1, -1, 1, 1) for value in (scale, bias))
    if scale.shape[1] != channels or bias.shape[1] != channels:
        raise InputError(f"{stored} has statistics of {scale.shape[1]} channels; the VAE has {channels}")
    if not (torch.isfinite(scale).all() and torch.isfinite(bias).all() and (scale > 0).all()):
        raise InputError(f"{stored} has a latent scale that is not positive, or a value that is not finite")
    return scale, bias
