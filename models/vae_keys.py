"""LDM state-dict keys of a KL autoencoder <-> diffusers' keys, bit-exactly both ways.

Public VAE files and the `vae` entry of REPA-E checkpoints hold LDM keys (CompVis latent-diffusion); the network is
`diffusers.AutoencoderKL`. Besides the names two things differ: LDM numbers the decoder's levels from the finest,
diffusers from the coarsest; LDM's attention projections are 1x1 convolutions (C, C, 1, 1), diffusers' linear (C, C).

Below, `ldm` and `diffusers` are the names of one module or parameter in either world.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch

# LDM's name of an attention layer -> diffusers'; and which weights differ in shape.
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PROJECTION = re.compile(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$")

KeyPair = tuple[str, str]  # (LDM key, diffusers key)


def key_pairs(config: Mapping) -> list[KeyPair]:
    """Every parameter's (LDM key, diffusers key) in the order of the public state dicts.

    Args:
        config: of an AutoencoderKL; block types, widths, layers per block, mid attention and quant convolutions count.

    Returns:
        One pair per parameter: encoder, decoder (levels from the finest), quant_conv, post_quant_conv.
    """
    modules = [*_encoder(config), *_decoder(config)]
    modules += [(name, name) for name in ("quant_conv", "post_quant_conv") if config.get(f"use_{name}", True)]
    return [(f"{ldm}.{leaf}", f"{diffusers}.{leaf}") for ldm, diffusers in modules for leaf in ("weight", "bias")]


def _encoder(config: Mapping) -> Iterator[KeyPair]:
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    yield "encoder.conv_in", "encoder.conv_in"
    for level, width in enumerate(widths):
        ldm, diffusers = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        before = widths[max(level - 1, 0)]
        yield from _level(ldm, diffusers, before, width, layers, "Attn" in config["down_block_types"][level])
        if level < len(widths) - 1:
            yield f"{ldm}.downsample.conv", f"{diffusers}.downsamplers.0.conv"
    yield from _middle("encoder", config)
    yield from _out("encoder")


def _decoder(config: Mapping) -> Iterator[KeyPair]:
    widths, layers = config["block_out_channels"], config["layers_per_block"] + 1
    yield "decoder.conv_in", "decoder.conv_in"
    yield from _middle("decoder", config)
    for level, width in enumerate(widths):  # LDM's level 0 is the finest, diffusers' up_blocks.0 the coarsest
        block = len(widths) - 1 - level
        ldm, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{block}"
        before = widths[min(level + 1, len(widths) - 1)]
        yield from _level(ldm, diffusers, before, width, layers, "Attn" in config["up_block_types"][block])
        if level > 0:
            yield f"{ldm}.upsample.conv", f"{diffusers}.upsamplers.0.conv"
    yield from _out("decoder")


def _level(ldm: str, diffusers: str, before: int, width: int, layers: int, attention: bool) -> Iterator[KeyPair]:
    for i in range(layers):
        yield from _resnet(f"{ldm}.block.{i}", f"{diffusers}.resnets.{i}", shortcut=i == 0 and before != width)
    for i in range(layers if attention else 0):
        yield from _attention(f"{ldm}.attn.{i}", f"{diffusers}.attentions.{i}")


def _middle(half: str, config: Mapping) -> Iterator[KeyPair]:
    ldm, diffusers = f"{half}.mid", f"{half}.mid_block"
    yield from _resnet(f"{ldm}.block_1", f"{diffusers}.resnets.0", shortcut=False)
    if config.get("mid_block_add_attention", True):
        yield from _attention(f"{ldm}.attn_1", f"{diffusers}.attentions.0")
    yield from _resnet(f"{ldm}.block_2", f"{diffusers}.resnets.1", shortcut=False)


def _out(half: str) -> Iterator[KeyPair]:
    yield f"{half}.norm_out", f"{half}.conv_norm_out"
    yield f"{half}.conv_out", f"{half}.conv_out"


def _resnet(ldm: str, diffusers: str, *, shortcut: bool) -> Iterator[KeyPair]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{ldm}.{name}", f"{diffusers}.{name}"
    if shortcut:
        yield f"{ldm}.nin_shortcut", f"{diffusers}.conv_shortcut"


def _attention(ldm: str, diffusers: str) -> Iterator[KeyPair]:
    for ldm_name, diffusers_name in _ATTENTION.items():
        yield f"{ldm}.{ldm_name}", f"{diffusers}.{diffusers_name}"


def ldm_shape(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, or an optimiser's moment of it, in the shape that LDM gives the LDM `key` (a view)."""
    return tensor[:, :, None, None] if _PROJECTION.search(key) and tensor.ndim == 2 else tensor


def diffusers_shape(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `ldm_shape`: the shape that diffusers gives the parameter with this LDM `key` (a view)."""
    return tensor[:, :, 0, 0] if _PROJECTION.search(key) and tensor.shape[2:] == (1, 1) else tensor


def to_ldm(vae: torch.nn.Module) -> "OrderedDict[str, torch.Tensor]":
    """The state dict of an AutoencoderKL under LDM keys, in the public order; tensors share memory with the network."""
    state = vae.state_dict()
    return OrderedDict((ldm, ldm_shape(ldm, state[diffusers])) for ldm, diffusers in key_pairs(vae.config))


def from_ldm(state: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """An LDM state dict under diffusers' keys (views of the same tensors).

    Args:
        state: exactly the keys of `key_pairs(config)`.

    Raises:
        KeyError: the first key that is missing, or that the architecture does not have.
    """
    pairs = key_pairs(config)
    for key in [ldm for ldm, _ in pairs if ldm not in state] + sorted(state.keys() - {ldm for ldm, _ in pairs}):
        raise KeyError(key)
    return {diffusers: diffusers_shape(ldm, state[ldm]) for ldm, diffusers in pairs}


def ldm_parameters(vae: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(LDM key, parameter) in LDM order, which is the order of the public checkpoints' `opt_vae`.

    The parameters have diffusers' shapes; `ldm_shape` and `diffusers_shape` convert the optimiser's moments.
    """
    parameters = dict(vae.named_parameters())
    return [(ldm, parameters[diffusers]) for ldm, diffusers in key_pairs(vae.config)]
