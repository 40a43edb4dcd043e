"""A VAE out of a diffusers folder, of its own or of a pipeline, on disk or by its name on the Hugging Face hub."""

import re
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from models.vae_architecture import kinds_by_name, require_modest, require_same_network, vae_models
from models.vae_names import hub_parts
from models.vae_state import PARTS, WEIGHTS, Say, check_fit, read_contents
from utils.errors import InputError
from utils.files import read_object
from utils.network import reachable
from utils.torch_files import is_stored_zip

_SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")  # in the order of preference
_PROBE_SECONDS = 5.0  # of the hub; with the first answer's eight no more than 15 in all
_ANSWER_SECONDS = 8.0


def load_folder(folder: Path, arch: str, wanted: str, say: Say) -> nn.Module:
    """The VAE of a diffusers folder, float32, on the CPU, in eval mode; strictly, as diffusers only warns about keys.

    Raises:
        InputError: no such folder, a class that is not known here, another architecture, a missing or unknown key.
    """
    folder, name = _own_folder(folder)
    vae = _from_pretrained(folder, kinds_by_name[name], say)
    if arch != "auto":
        if name != "AutoencoderKL":
            raise InputError(f"{folder} holds a {name}; {wanted} is an AutoencoderKL, and 'auto' takes the folder's")
        levels = len(vae.config["block_out_channels"])
        check_fit(vae.config["latent_channels"], levels, vae_models[arch], str(folder), wanted)
        require_same_network(vae, arch, str(folder), wanted)
    return vae


def folder_by_shape(folder: Path) -> nn.Module:
    """The VAE of a diffusers folder without weights, on the meta device: its configuration alone is read."""
    folder, name = _own_folder(folder)
    try:
        with torch.device("meta"):
            return kinds_by_name[name].from_config(read_object(folder / "config.json"))
    except Exception as error:  # whatever diffusers and torch run into
        raise InputError(f"{folder}: the configuration makes no {name} ({error})") from None


def _own_folder(folder: Path) -> tuple[Path, str]:
    """The folder of the VAE itself, which may lie in a pipeline's, and the name of its class."""
    if _class_name(folder) not in kinds_by_name and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"  # a whole pipeline, which may have a configuration of its own
    name = _class_name(folder)
    if name is None:
        raise InputError(f"{folder} is no diffusers folder: a config.json with '_class_name' is needed")
    if name not in kinds_by_name:
        raise InputError(f"{folder} holds a {name}; one of {', '.join(kinds_by_name)} is needed")
    require_modest(read_object(folder / "config.json"), str(folder / "config.json"))
    return folder, name


def _class_name(folder: Path) -> str | None:
    try:
        name = read_object(folder / "config.json").get("_class_name")
    except InputError:
        return None
    return name if isinstance(name, str) else None


def _from_pretrained(folder: Path, network: type, say: Say) -> nn.Module:
    variant = _variant(folder, say)
    files = _weights(folder, variant)
    for file in files:
        _require_floats(file)
    compressed = any(zipfile.is_zipfile(file) and not is_stored_zip(file) for file in files)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        vae, report = network.from_pretrained(
            str(folder),
            variant=variant,
            torch_dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            disable_mmap=compressed,  # `is_stored_zip` says why
        )
    except Exception as error:  # diffusers and safetensors have no common ancestor
        reason = str(error).split(". ")[0]
        raise InputError(f"{folder} cannot be loaded as a diffusers {network.__name__}: {reason}") from None
    finally:
        diffusers_logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report[kind]:
            raise InputError(f"{folder}: {kind.replace('_keys', ' key')} {key!r}")
    return vae.eval()


def _variant(folder: Path, say: Say) -> str | None:
    """The one variant of its weights that a folder has, where it has no plain ones."""
    names = {file.name for file in folder.glob(f"{WEIGHTS}.*")}
    if any(re.fullmatch(rf"{WEIGHTS}\.(safetensors|bin)(\.index\.json)?", name) for name in names):
        return None
    variants = {match[1] for name in names if (match := re.fullmatch(rf"{WEIGHTS}\.(\w+)\.(safetensors|bin)", name))}
    if len(variants) > 1:
        listed = ", ".join(sorted(variants))
        raise InputError(f"{folder} has its weights only as {listed}; a folder with one of them is needed")
    for variant in variants:
        say(f"{folder}: it has only the variant {variant!r} of its weights, which was taken")
        return variant
    return None


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The files that diffusers will read: .safetensors, else .bin."""
    # The variant stands before or after a shard's number.
    middle = rf"(\.{variant})?(-\d+-of-\d+)?(\.{variant})?" if variant else r"(-\d+-of-\d+)?"
    pattern = re.compile(rf"{WEIGHTS}{middle}\.(safetensors|bin)")
    files = [file for file in folder.iterdir() if pattern.fullmatch(file.name)]
    return [file for file in files if file.suffix == ".safetensors"] or files


def _require_floats(file: Path) -> None:
    """Refuse weights that diffusers would silently convert: quantised ones, whose scale lies elsewhere."""
    try:
        contents = read_contents(file, lambda _: None)
    except InputError:
        return  # diffusers says what is wrong with it
    for key, value in contents.items():
        if isinstance(value, Tensor) and not value.is_floating_point() and key.startswith(PARTS):
            raise InputError(f"{file}: {key!r} is {value.dtype}; floating point is needed")


# The hub


def hub_folder(name: str, say: Say) -> Path:
    """The folder of a VAE on the hub as it lies in the hub's cache; what is missing is downloaded.

    A filled cache is used as it is, without a look at the hub; its revision is said.

    Args:
        name: `models.vae_names.is_hub_name`; without a folder, the repository itself or else its vae/.

    Raises:
        InputError: not in the cache, and the hub is not reached, or has no such VAE, or does not give it out.
    """
    if cached := cached_folder(name):
        say(f"{name}: taken from the hub's cache, revision {_revision(cached)}")
        return cached
    return _download(*_places(name), name, say)


def cached_folder(name: str) -> Path | None:
    """As `hub_folder`, of what lies in the cache; None: it is not there."""
    return _cached(*_places(name))


def _places(name: str) -> tuple[str, tuple[str, ...]]:
    """The repository of a VAE, and the folders in it where the VAE may be."""
    repository, subfolder = hub_parts(name)
    return repository, (f"{subfolder}/",) if subfolder else ("", "vae/")


def _revision(folder: Path) -> str:
    parts = folder.parts
    return parts[parts.index("snapshots") + 1][:12] if "snapshots" in parts else "unknown"


def _cached(repository: str, folders: tuple[str, ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for folder in folders:
        config = try_to_load_from_cache(repository, f"{folder}config.json")
        weights = [try_to_load_from_cache(repository, f"{folder}{WEIGHTS}{suffix}") for suffix in _SUFFIXES]
        if not isinstance(config, str) or not any(isinstance(path, str) for path in weights):
            continue
        if folder == folders[-1] or _class_name(Path(config).parent) in kinds_by_name:
            return Path(config).parent
    return None


def _download(repository: str, folders: tuple[str, ...], name: str, say: Say) -> Path:
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    # Whether the hub answers: hf_hub_download tries for half a minute, and then speaks of missing files.
    address = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name} is no local path and not in the hub's cache, and HF_HUB_OFFLINE is set")
    offline = f"{name} is no local path and not in the hub's cache, and {address} was not reached"
    if not reachable(constants.ENDPOINT, _PROBE_SECONDS):
        raise InputError(offline)
    try:
        # The first folder with a VAE's configuration, or else the last with any, whose class is named then.
        found = None
        for folder in folders:
            try:
                get_hf_file_metadata(hf_hub_url(repository, f"{folder}config.json"), timeout=_ANSWER_SECONDS)
            except errors.RemoteEntryNotFoundError:
                continue
            found = folder
            config = Path(hf_hub_download(repository, f"{folder}config.json"))
            if _class_name(config.parent) in kinds_by_name:
                break
        if found is None:
            raise InputError(f"{name}: {' and '.join(f'{folder}config.json' for folder in folders)} are not on the hub")

        # The first form of its weights that there is.
        for suffix in _SUFFIXES:
            try:
                hf_hub_download(repository, f"{found}{WEIGHTS}{suffix}")
            except errors.RemoteEntryNotFoundError:
                continue
            say(f"{name}: taken from the hub, revision {_revision(config.parent)}")
            return config.parent
        raise InputError(f"{name}: the hub has no {found}{WEIGHTS}.safetensors or .bin")
    except errors.GatedRepoError:
        terms = f"accept its terms on https://{address}/{repository} and log in with `hf auth login`"
        raise InputError(f"{name} is given out on conditions: {terms}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name} is no local path, and no repository on {address} (or a private one)") from None
    except InputError:
        raise
    except Exception as error:  # whatever the connection ends in: the client has no common ancestor for it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{offline} ({reason[:200]})") from None
