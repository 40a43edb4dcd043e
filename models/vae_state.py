"""A VAE out of a file's tensors: where they lie in it, under which names, and which architecture they belong to."""

import argparse
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.vae_architecture import UNSEEN, build_vae, downsampling, public_shapes, require_modest, vae_models
from models.vae_keys import key_pairs
from utils.distributed import rank
from utils.errors import InputError
from utils.files import read_object
from utils.inert import read_inert
from utils.torch_files import NotPlain, read_torch_file

logger = logging.getLogger(__name__)

Say = Callable[[str], object]  # takes a line about what was chosen or left out

# What public training checkpoints of VAEs hold beside the VAE: losses, an EMA, VA-VAE's alignment to an encoder.
FOREIGN_PREFIXES = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the file beside a config.json
_STATISTICS = ("latents_mean", "latents_std")  # of particular weights, in a configuration

CONTAINERS = ("state_dict", "model", "vae", "ema")
_OUR_RECORD = ("vae_config", "args", "format", "steps")  # of a training checkpoint; `recorded_config` reads it
_MARK = "decoder.conv_in.weight"  # every VAE has it, under LDM's names as under diffusers'
_DEEPEST = 5  # containers in containers; one may hold itself
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_PREFIX = re.compile(rf"((?:{'|'.join((*CONTAINERS, 'first_stage_model'))})\.)*")
_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")  # DistributedDataParallel and torch.compile, at any depth
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")


def log_line(line: str) -> None:
    """Log what was chosen or left out, on rank 0."""
    if rank() == 0:
        logger.warning(line)


def read_contents(path: Path, say: Say) -> dict:
    """What a file of weights holds: tensors and plain values; objects of foreign classes are left out and counted.

    Raises:
        InputError: unreadable, or no such file.
    """
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a header may name types that torch lacks, or sizes that nothing has
            raise InputError(f"{path} is no readable .safetensors file ({error})") from None
    try:
        return read_torch_file(path)
    except NotPlain:
        if not zipfile.is_zipfile(path):  # torch before 1.6
            raise
        contents, left_out = read_inert(path)
    if not left_out:  # only the pickle's protocol was another
        return contents
    objects = ", ".join(f"{count} of {name}" for name, count in left_out.most_common(4))
    objects += ", ..." * (len(left_out) > 4)
    say(f"{path}: {left_out.total()} objects of foreign classes were left out unread ({objects})")
    return contents


# Where the VAE is


def find_state(contents: Mapping, what: str, say: Say = log_line) -> dict[str, Tensor]:
    """The VAE's tensors under their own names (LDM's or diffusers'), wherever in a file's contents they lie.

    They may lie in a dict under a name of `CONTAINERS`, and their names may begin with `first_stage_model.`, or hold
    `module.` and `_orig_mod.`. Of two VAEs the one under `ema` is taken, as samplers do; otherwise two are refused.
    What lies beside the VAE, or under `FOREIGN_PREFIXES`, is left out and counted.

    Raises:
        InputError: no VAE, more than one, something in it that is no tensor of floating point.
    """
    if not isinstance(contents, Mapping):
        raise InputError(f"{what} is a {type(contents).__name__}; a dict of tensors is needed")

    # Every entry as (the dict it lies in, its name there without wrappers, its value).
    entries = [(where, _WRAPPER.sub("", str(key)), value) for where, key, value in _entries(contents)]
    found = {(where, key.removesuffix(_MARK)) for where, key, _ in entries if re.search(rf"(^|\.){_MARK}$", key)}
    known = sorted(place for place in found if _PREFIX.fullmatch(place[1]))
    if not found:
        raise InputError(f"{what} is not the state dict of a VAE: it lacks the key {_MARK!r}")
    if not known:
        (_, prefix), *_ = found
        raise InputError(f"{what} holds a decoder under {prefix!r}, a prefix that no known program gives a VAE")
    place = known[0] if len(known) == 1 else _one_of(known, what, say)

    # The VAE's own, and what is left.
    own, others = {}, Counter()
    for where, key, value in entries:
        inner = key.removeprefix(place[1])
        is_beside = where != place[0] or not key.startswith(place[1])
        if not is_beside and (isinstance(value, Tensor) or inner.startswith(PARTS)):
            key = _OLD_NAME.sub(lambda match: _OLD_ATTENTION[match[1]], inner)
            if key in own:
                raise InputError(f"{what} has the key {key!r} twice, once under an old name or a wrapper's")
            own[key] = value
        elif key not in _OUR_RECORD:
            others[where.rstrip(".") or key.split(".")[0]] += 1
    if others:
        listed = ", ".join(f"{name} ({count})" for name, count in others.most_common(6))
        under = "".join(place).rstrip(".")
        there = f"under {under!r}" if under else "at its top"
        say(f"{what}: the VAE is what lies {there}; left out: {listed}{', ...' * (len(others) > 6)}")
    for prefix in FOREIGN_PREFIXES:
        if count := sum(key.startswith(prefix) for key in own):
            say(f"{what}: {count} keys under {prefix!r} are not the VAE's and were dropped")
    own = {key: value for key, value in own.items() if not key.startswith(FOREIGN_PREFIXES)}
    for key, value in own.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{what}: {key!r} is a {type(value).__name__}; a tensor is needed")
        if not value.is_floating_point() and key.startswith(PARTS):  # quantised, whose scale lies elsewhere
            raise InputError(f"{what}: {key!r} is {value.dtype}; floating point is needed")
    return own


def _entries(contents: Mapping, where: str = "") -> Iterator[tuple[str, object, object]]:
    for key, value in contents.items():
        if key in CONTAINERS and isinstance(value, Mapping) and where.count(".") < _DEEPEST:
            yield from _entries(value, f"{where}{key}.")
        else:
            # To print a tuple of tuples can take forever.
            yield where, key if isinstance(key, str | int) else type(key).__name__, value


def _one_of(places: list[tuple[str, str]], what: str, say: Say) -> tuple[str, str]:
    names = [repr("".join(place).rstrip(".") or "its top") for place in places]
    averaged = [place for place in places if "ema" in "".join(place).split(".")]
    if len(averaged) != 1:
        raise InputError(f"{what} holds {len(places)} VAEs, under {', '.join(names)}; a file with one is needed")
    say(f"{what} holds {len(places)} VAEs, under {', '.join(names)}: that under 'ema' is taken, as samplers do")
    return averaged[0]


# Which architecture it has


def recorded_config(contents: Mapping) -> str | Mapping | None:
    """What a training checkpoint says of its VAE: its `vae_config`, or the preset of its arguments."""
    if isinstance(contents.get("vae_config"), Mapping):
        return contents["vae_config"]
    args = contents.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    recorded = args.get("vae") if isinstance(args, Mapping) and "vae" in contents else None
    return recorded if isinstance(recorded, str) and recorded in vae_models else None


def config_beside(path: Path, state: Mapping[str, Tensor], say: Say) -> Mapping | None:
    """The configuration that lies with a file, as save_vae_weights.py and diffusers have it, if it is this VAE's.

    Its statistics are those of the weights that it was written with: another file beside it does not get them.
    """
    of_diffusers = path.name.startswith(f"{WEIGHTS}.")
    files = [path.parent / "diffusers" / "config.json", path.parent / "config.json"]
    for file in reversed(files) if of_diffusers else files:
        try:
            config = read_object(file)
        except InputError:
            continue
        if config.get("_class_name") != "AutoencoderKL":
            continue
        try:
            problem = _problem(state, _on_meta(config))
        except InputError as error:
            problem = str(error)
        if problem is None:
            own = of_diffusers and file.parent == path.parent
            return {key: value for key, value in config.items() if own or key not in _STATISTICS}
        say(f"{file} was not used: it describes another network than {path} ({problem})")
    return None


def choose_config(
    state: Mapping[str, Tensor], arch: str, recorded: str | Mapping | None, what: str, wanted: str
) -> Mapping:
    """The configuration of a state dict: the preset that is asked for, the recorded one, or the shape that fits.

    The latent statistics that are recorded with the weights stay, whichever it is.

    Raises:
        InputError: the preset is another network than the recorded one; or "auto", and nothing says it.
    """
    recorded = vae_models[recorded] if isinstance(recorded, str) else recorded
    if arch != "auto":
        check_fit(_channels(state, what), _levels(state), vae_models[arch], what, wanted)
        for key in UNSEEN if recorded else ():
            ours, theirs = (
                {"norm_num_groups": 32, "act_fn": "silu"} | dict(one) for one in (vae_models[arch], recorded)
            )
            if ours[key] != theirs[key]:
                raise InputError(f"{what} has {key} {theirs[key]}; {wanted} has {ours[key]}: 'auto' takes the file's")
        return vae_models[arch] | {key: recorded[key] for key in _STATISTICS if recorded and key in recorded}
    if recorded:
        return recorded
    for config in public_shapes.values():
        if _widths(state) == config["block_out_channels"] and _problem(state, _on_meta(config)) is None:
            return config
    unseen = "fits no public shape, and tensors do not show the groups of its norms"
    needed = "its diffusers folder, or that folder's config.json in diffusers/ beside the file"
    raise InputError(f"{what} does not say its architecture: it {unseen}; {wanted} needs {needed}")


def _channels(state: Mapping[str, Tensor], what: str) -> int:
    """Channels of the latents."""
    if state[_MARK].ndim != 4:
        raise InputError(f"{what} has {_MARK!r} of shape {tuple(state[_MARK].shape)}; four axes are needed")
    return state[_MARK].shape[1]


def _widths(state: Mapping[str, Tensor]) -> list[int]:
    """Channels of the encoder's levels, from the finest; LDM or diffusers keys."""
    widths = []
    for level in range(_levels(state)):
        names = (f"encoder.down.{level}.block.0.conv1.bias", f"encoder.down_blocks.{level}.resnets.0.conv1.bias")
        widths += [len(state[name]) for name in names if name in state and state[name].ndim]
    return widths


def _levels(state: Mapping[str, Tensor]) -> int:
    """Resolutions that the encoder passes through, each half of the one before; LDM or diffusers keys."""
    matches = [re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.", key) for key in state]
    return max(len({match[1] for match in matches if match}), 1)  # the numbers themselves may be of any size


# The network


def vae_from_state(state: Mapping, config: str | Mapping, what: str, wanted: str, say: Say = log_line) -> AutoencoderKL:
    """A VAE with exactly the weights of a state dict, float32, on the CPU, in eval mode.

    Args:
        state: as `find_state` takes it.
        config: a name in `vae_models`, "auto" (a public shape that fits exactly), or a configuration.
        what, wanted: what the messages call the state dict and the architecture.
        say: takes a line about each thing that is chosen or left out.

    Raises:
        InputError: not a VAE, another architecture, a missing or unknown key.
    """
    state = find_state(state, what, say)
    if isinstance(config, str):
        config = choose_config(state, config, None, what, wanted)
    vae = _on_meta(config, what)
    # The network's configuration is complete: with diffusers' defaults.
    check_fit(_channels(state, what), _levels(state), vae.config, what, wanted)
    if problem := _problem(state, vae, wanted):
        raise InputError(f"{what} {problem}")

    # Copies, as the file may be memory-mapped.
    names, weights = _names(state, vae), {}
    for name, parameter in vae.named_parameters():
        weights[name] = _shaped(state[names[name]], parameter).to(torch.float32, copy=True)
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def check_fit(channels: int, levels: int, config: Mapping, what: str, wanted: str) -> None:
    """Refuse another number of latent channels or levels than a configuration has."""
    if channels != config["latent_channels"]:
        raise InputError(f"{what} has {channels} latent channels; {wanted} needs {config['latent_channels']}")
    if levels != len(config["block_out_channels"]):
        raise InputError(f"{what} downsamples by {2 ** (levels - 1)}; {wanted} needs {downsampling(config)}")


def _on_meta(config: Mapping, what: str = "its configuration") -> AutoencoderKL:
    require_modest(config, what)
    try:
        with torch.device("meta"):
            return build_vae(config)
    except Exception as error:  # whatever diffusers and torch run into
        raise InputError(f"{what}: the configuration makes no AutoencoderKL ({error})") from None


def _names(state: Mapping[str, Tensor], vae: nn.Module) -> dict[str, str]:
    """The network's names of its parameters -> the file's."""
    in_diffusers_keys = any(key.startswith("encoder.down_blocks.") for key in state)
    return {name: (name if in_diffusers_keys else ldm) for ldm, name in key_pairs(vae.config)}


def _shaped(tensor: Tensor, parameter: Tensor) -> Tensor:
    """An attention projection that is a 1 x 1 convolution in the file and linear in the network (a view)."""
    return tensor[:, :, 0, 0] if parameter.ndim == 2 and tensor.shape[2:] == (1, 1) else tensor


def _problem(state: Mapping[str, Tensor], vae: nn.Module, wanted: str = "it") -> str | None:
    """The first thing that keeps a state dict from being exactly the network's; None: nothing."""
    names, parameters = _names(state, vae), dict(vae.named_parameters())
    for key in [key for key in names.values() if key not in state]:
        return f"lacks the key {key!r}, which {wanted} needs"
    for key in sorted(state.keys() - set(names.values())):
        return f"has the key {key!r}, which {wanted} does not have"
    for name, key in names.items():
        found, needed = tuple(_shaped(state[key], parameters[name]).shape), tuple(parameters[name].shape)
        if found != needed:
            return f"has {key!r} of shape {found}; {wanted} needs {needed}"
    return None
