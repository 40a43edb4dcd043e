"""A tuned VAE's way out of a checkpoint: the public `.pt` files and a diffusers folder."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.vae_architecture import build_vae, vae_config
from models.vae_keys import to_ldm
from models.vae_state import Say, choose_config, find_state, log_line, recorded_config, vae_from_state
from utils.errors import InputError
from utils.files import atomic_write, remove_abandoned, sha256, sync

DIFFUSERS_FOLDER = "diffusers"  # inside the VAE's own folder


def vae_of_checkpoint(
    checkpoint: Mapping, path: str | Path, arch: str | None = None, say: Say = log_line
) -> AutoencoderKL:
    """The VAE inside a checkpoint of train_repae.py or train_vae.py, ours or public.

    Args:
        checkpoint: as `utils.checkpoint.read_checkpoint` returns it, with the entry `vae`.
        path: names it in messages.
        arch: a name in `vae_models`; None: the checkpoint's `vae_config`, else `vae` of its arguments, else the public
            shape that it fits.
        say: takes a line about each thing that is left out.

    Raises:
        InputError: the weights do not fit the architecture, or nothing says it.
    """
    recorded, what = recorded_config(checkpoint), f"{path}: vae"
    known = "its vae_config" if isinstance(recorded, Mapping) else f"--vae {recorded or 'auto'}"
    wanted = f"--vae {arch}" if arch else known
    state = find_state(checkpoint["vae"], what, say)
    return vae_from_state(state, choose_config(state, arch or "auto", recorded, what, wanted), what, wanted)


def vae_sha256(path: str | Path, vae: torch.nn.Module) -> str:
    """Checksum of the VAE's file; of a folder or hub name, of the weights (an AutoencoderKL's in LDM order)."""
    if Path(path).is_file():
        return sha256(path)
    return weights_sha256(vae)


def weights_sha256(vae: torch.nn.Module) -> str:
    """Checksum of a VAE's weights, wherever they came from."""
    digest = hashlib.sha256()
    for tensor in (to_ldm(vae) if type(vae) is AutoencoderKL else vae.state_dict()).values():
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def vae_file_names(name: str) -> dict[str, str]:
    """What the set of files of the VAE `name` is called, inside its folder."""
    return {
        "vae": f"{name}.pt",
        "statistics": f"{name}-latents-stats.pt",
        "discriminator": f"{name}-discriminator-ckpt.pt",
        "diffusers": DIFFUSERS_FOLDER,
    }


def require_new_vae_files(folder: str | Path, name: str, flag: str = "--vae-name") -> None:
    """Refuse to replace a VAE of this name.

    Raises:
        InputError: one of the files is there.
    """
    for file in vae_file_names(name).values():
        if (path := Path(folder, name, file)).exists():
            raise InputError(f"{flag}: {path} exists already; take another name, or --overwrite")


def save_vae_files(
    folder: str | Path,
    name: str,
    vae: AutoencoderKL,
    scale: Tensor | None,
    bias: Tensor | None,
    discriminator_state: Mapping[str, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a VAE as the public `.pt` files and as a diffusers folder, under temporary names until all are whole.

    A folder that is not there yet appears with all of them at once: what is killed on the way can be started again.

    Args:
        folder: where `<name>/` is made, with `<name>.pt` (LDM keys), `<name>-latents-stats.pt` and `diffusers/`, whose
            configuration carries `latents_mean` and `latents_std`.
        scale, bias: of the latents, (1, C, 1, 1): 1 / std and mean; None: unknown, and none are written.
        discriminator_state: for `<name>-discriminator-ckpt.pt`; None: no such file.
        overwrite: replace what there is; otherwise it is refused.

    Returns:
        the folder `<folder>/<name>`.
    """
    if not overwrite:
        require_new_vae_files(folder, name)

    # The public files and what they hold.
    stats = None
    if scale is not None:
        scale, bias = (value.detach().float().cpu().reshape(1, -1, 1, 1) for value in (scale, bias))
        stats = {"latents_scale": scale, "latents_bias": bias}
    contents = {
        "vae": _on_cpu(to_ldm(vae)),
        "statistics": stats,
        "discriminator": None if discriminator_state is None else _on_cpu(discriminator_state),
    }

    target = Path(folder, name)
    with contextlib.nullcontext(target) if target.exists() else _atomic_folder(target, replace=False) as where:
        paths = {kind: where / file for kind, file in vae_file_names(name).items()}
        # All are written before the first gets its name: a failure on the way leaves the old set as it was.
        with contextlib.ExitStack() as stack:
            for kind, content in contents.items():
                if content is not None:
                    torch.save(content, stack.enter_context(atomic_write(paths[kind])))
            _save_diffusers(vae, stats, stack.enter_context(_atomic_folder(paths["diffusers"], replace=True)))
        for kind, content in contents.items():
            if content is None:
                paths[kind].unlink(missing_ok=True)  # of the VAE that was overwritten
    return target


def save_latent_stats(path: Path, scale: Tensor, bias: Tensor) -> None:
    """The statistics of latents by themselves, as they lie beside public VAEs."""
    with atomic_write(path) as temporary:
        torch.save({"latents_scale": scale, "latents_bias": bias}, temporary)


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Own storage each: torch.save writes the whole storage of a view.
    return type(state)((key, tensor.detach().cpu().contiguous().clone()) for key, tensor in state.items())


def _save_diffusers(vae: AutoencoderKL, stats: Mapping[str, Tensor] | None, folder: Path) -> None:
    # The statistics belong into the configuration, which a network takes when it is made: hence a copy.
    statistics = {}
    if stats is not None:
        statistics["latents_mean"] = stats["latents_bias"].flatten().tolist()
        # In float64, so that 1 / std gives the scale back.
        statistics["latents_std"] = (1.0 / stats["latents_scale"].double()).flatten().tolist()
    with torch.device("meta"):
        copy = build_vae(vae_config(vae) | statistics)
    copy.load_state_dict({key: tensor.detach().cpu() for key, tensor in vae.state_dict().items()}, assign=True)
    copy.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors gives them to their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)


@contextlib.contextmanager
def _atomic_folder(path: Path, *, replace: bool):
    """`utils.files.atomic_write` for a folder; while an old one is replaced there is a moment without any."""
    remove_abandoned(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
