"""From a public encoder file to the weights of its timm network: find, download, read, convert, check."""

import http.client
import logging
import math
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from tqdm import tqdm

from models.encoder_table import EncoderSpec
from utils.errors import InputError
from utils.files import atomic_write, require_disk, sha256
from utils.hub import cache_path, fetch_once
from utils.torch_files import read_torch_file

logger = logging.getLogger(__name__)

FOLDER = Path("ckpts")  # where the public code looks, below the folder that the command is run from


# Find or fetch the file


def find_weights(spec: EncoderSpec, checkpoint: str | None = None) -> Path:
    """The encoder's weights file: the one that was named, else `ckpts/`, else the cache, else a download into it.

    Raises:
        InputError: the named file does not exist; or there is none and none could be fetched (the message says what to
            get, from where, and where to put it).
    """
    if checkpoint is not None:
        path = Path(checkpoint)
        if path.is_dir():
            otherwise = f"a folder in timm's format: --enc-type timm:local-dir:{checkpoint}"
            raise InputError(f"--enc-ckpt: {checkpoint} is a folder; a weights file is needed ({otherwise})")
        if not path.is_file():
            raise InputError(f"--enc-ckpt: {checkpoint} does not exist; {_how_to_get(spec)}")
        return path
    for path in _usual_places(spec):
        if path.is_file():
            return path
    return download(spec)


def _usual_places(spec: EncoderSpec) -> list[Path]:
    """Where the public code, torch hub and the publisher's own package put the file."""
    places = [FOLDER / spec.file]
    if spec.url:
        places.append(cache_path(spec.url))
    if spec.cached_as:
        places.append(Path(spec.cached_as).expanduser())
    return places


def _how_to_get(spec: EncoderSpec) -> str:
    source = spec.url or f"the link at {spec.page}"
    return f"get it ({spec.size_gb} GB) from {source} and put it at {FOLDER / spec.file}, or name it by --enc-ckpt"


def download(spec: EncoderSpec) -> Path:
    """Fetch the encoder's file into torch hub's cache, by one process while the others wait.

    Returns:
        Its path; nothing is fetched when it is there already.

    Raises:
        InputError: no address, no connection, too small a disk, an incomplete transfer, a wrong checksum.
    """
    if not spec.url:
        raise InputError(f"--enc-type: {spec.name} has no weights here and no direct address; {_how_to_get(spec)}")
    try:
        return fetch_once(spec.url, lambda path: _fetch(spec, path))
    except (OSError, http.client.HTTPException) as error:
        problem = f"has no weights here, and the download failed ({getattr(error, 'reason', None) or error})"
        raise InputError(f"--enc-type: {spec.name} {problem}; {_how_to_get(spec)}") from error


def _fetch(spec: EncoderSpec, path: Path, timeout: float = 30.0) -> None:
    """Download to `path`, which appears when length and checksum are right; room on the disk is asked for first."""
    logger.info("downloading %s (%s GB) to %s", spec.url, spec.size_gb, path)
    with urllib.request.urlopen(spec.url, timeout=timeout) as response, atomic_write(path) as temporary:
        length = int(response.headers.get("Content-Length") or 0)
        require_disk(path, length, f"--enc-type: the weights of {spec.name}")
        bar = tqdm(total=length or None, unit="B", unit_scale=True, desc=path.name)
        with temporary.open("wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            received = file.tell()
        if length and received != length:
            raise OSError(f"{received} of {length} bytes arrived")
        if spec.sha256 and sha256(temporary) != spec.sha256:
            raise OSError(f"its sha256 is not {spec.sha256}")


# Read the file


def read_weights(path: str | Path, *, script_sha256: str | None = None) -> dict:
    """The content of a weights file, on the CPU; nothing in it is executed unless its checksum is known.

    Args:
        path: `.safetensors`; or what `torch.save` wrote (its zip format is mapped into memory, so that only the tensors
            in use are read); or the TorchScript archive of the given checksum.
        script_sha256: of the one TorchScript archive to open; opening such a file runs code of its own.

    Raises:
        InputError: a web page, a truncated or foreign file, another TorchScript archive.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page, not weights: the download went wrong")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is truncated or no safetensors file ({error})") from error
    if not _is_torchscript(path):
        return read_torch_file(path)

    # A TorchScript archive, such as CLIP's, runs code when it is opened: the one that is known, or none.
    found = sha256(path)
    if found != script_sha256:
        needed = f"only the one with sha256 {script_sha256}" if script_sha256 else "a file of tensors"
        raise InputError(f"{path} is a TorchScript archive (sha256 {found}); {needed} is opened")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself is deprecated; CLIP's file stays one
        return torch.jit.load(path, map_location="cpu").state_dict()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


# Convert and check


def load_weights(network: nn.Module, spec: EncoderSpec, path: str | Path) -> None:
    """Fill a network of `models.encoders.build` from the encoder's public file, or from timm's converted copy of it.

    Raises:
        InputError: unreadable, or not this encoder's file; the line names the file, what it has and what is needed.
    """
    checkpoint = read_weights(path, script_sha256=spec.sha256)
    state = to_timm_state(spec, checkpoint, network, path)
    # Copies: no tensor stays tied to the mapped file, and half-precision matrices (CLIP) become float32.
    state = {key: tensor.to(torch.float32, copy=True) for key, tensor in state.items()}
    network.load_state_dict(state, strict=True, assign=True)


def to_timm_state(spec: EncoderSpec, checkpoint: Mapping, network: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Weights of a network out of what the encoder's file holds.

    Args:
        spec: the encoder that the file should hold.
        checkpoint: content of the file; it is not changed.
        network: timm's ViT, which gives the keys, the shapes and the position grid.
        path: the file, for the messages.

    Returns:
        A state dict that fits strictly; positions are resampled (bicubic, antialiased) to the network's grid.

    Raises:
        InputError: a key is missing, unknown, or of another shape.
    """

    def refuse(problem: str):
        raise InputError(f"{path} does not hold {spec.name}: {problem}")

    # From the publisher's names to timm's, with positions resampled. Classifiers are of no use here.
    state = _encoder_part(spec, checkpoint, refuse)
    _check_before_conversion(spec, state, network, refuse)
    try:
        state = checkpoint_filter_fn(state, network)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        refuse(f"timm cannot convert it ({error!r})")
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}

    # Exactly the network's keys and shapes.
    expected = network.state_dict()
    if missing := [key for key in expected if key not in state]:
        refuse(f"the key {missing[0]!r} is missing" + _and_more(missing))
    if unknown := [key for key in state if key not in expected]:
        refuse(f"the key {unknown[0]!r} is unexpected" + _and_more(unknown))
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            refuse(f"{key!r} has shape {tuple(tensor.shape)}, {tuple(expected[key].shape)} is needed")
    return state


def _encoder_part(spec: EncoderSpec, checkpoint: Mapping, refuse) -> dict[str, Tensor]:
    """The file's entries that belong to the encoder, under their bare names."""
    # Out of the wrapper, beside which nothing unknown may stand; timm's converted copy has none.
    wrapper, prefix = spec.wrapper, spec.prefix
    if wrapper is not None and wrapper not in checkpoint and spec.timm_copy and "pos_embed" in checkpoint:
        wrapper, prefix = None, ""
    if wrapper is not None:
        if not isinstance(checkpoint.get(wrapper), Mapping):
            refuse(f"the entry {wrapper!r} is needed, it has {_some(checkpoint)}")
        for key in checkpoint:
            if key != wrapper and not _is_ignored(spec, key):
                refuse(f"the entry {key!r} beside {wrapper!r} is unexpected")
        checkpoint = checkpoint[wrapper]

    # Without the prefix, and with the publisher's slips in naming mended.
    state = {}
    for key, value in checkpoint.items():
        if _is_ignored(spec, key):
            continue
        if not key.startswith(prefix) or not isinstance(value, Tensor):
            refuse(f"the key {key!r} is unexpected" + (f", names begin with {prefix!r}" if prefix else ""))
        name = key.removeprefix(prefix)
        for wrong, right in spec.renamed:
            if name.startswith(wrong):
                name = right + name.removeprefix(wrong)
        state[name] = value
    return state


def _check_before_conversion(spec: EncoderSpec, state: dict[str, Tensor], network: nn.Module, refuse) -> None:
    """What timm's conversion would bend to fit, or fail on without a word of use."""
    patches = state.get("patch_embed.proj.weight", state.get("visual.conv1.weight"))
    if patches is None:
        refuse(f"the key 'patch_embed.proj.weight' is missing, it has {_some(state)}")
    if patches.shape != (needed := network.patch_embed.proj.weight.shape):
        refuse(f"its patch projection has shape {tuple(patches.shape)}, {tuple(needed)} is needed")

    # Another variant of the same network: with registers, or without.
    registers = "register_tokens" in state or "reg_token" in state
    if registers != (spec.prefix_tokens > 1):
        refuse("it has register tokens" if registers else "the key 'register_tokens' is missing")

    # Positions are resampled as a square; timm's copies with registers keep none for the class token.
    positions = state.get("pos_embed", state.get("visual.positional_embedding"))
    if positions is not None:
        with_class = spec.prefix_tokens > 0 and "reg_token" not in state
        grid_tokens = positions.shape[-2] - with_class
        if math.isqrt(grid_tokens) ** 2 != grid_tokens:
            refuse(f"its {grid_tokens} positions are no square grid")


def _is_ignored(spec: EncoderSpec, key: str) -> bool:
    return any(key.startswith(name) if name[-1] in "._" else key == name for name in spec.ignored)


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _some(entries: Mapping) -> str:
    names = [repr(name) for name in list(entries)[:3]]
    return ", ".join(names) + (", ..." if len(entries) > 3 else "") if names else "nothing"
