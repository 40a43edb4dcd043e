"""SiT with the filled weights of a LightningDiT of the golden files."""

import torch

from models.sit import SiT
from tests.support.golden_data import filled

REL, ABS = 1e-5, 1e-7
SHIFTS = slice(0, None, 3)  # of the six parts of a block's modulation


def sit_config(theirs: dict) -> dict:
    """The arguments of `SiT` for the constructor arguments of theirs."""
    same = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    (lightning,) = {theirs[f"use_{part}"] for part in ("rmsnorm", "swiglu", "rope")}
    config = {key: theirs[key] for key in same if key in theirs}
    return config | dict(lightning=lightning, qk_norm=theirs["use_qknorm"], encoder_depth=1, z_dims=())


def build(case: dict) -> SiT:
    """With their weights as they are: a function of their time, and with their velocity."""
    sit = SiT(**sit_config(case["config"]))
    state = {key: value for key, value in filled(case["manifest"]).items() if not key.startswith("feat_rope.")}
    for key in [key for key in state if case["config"]["wo_shift"] and key.startswith("blocks.") and "adaLN" in key]:
        state[key] = with_zero_shift(state[key])
    fixed = sit.load_state_dict(state, strict=False)
    assert not fixed.unexpected_keys
    assert all(key == "pos_embed" or key.startswith(("feat_rope.", "bn.")) for key in fixed.missing_keys)
    return sit


def with_zero_shift(modulation: torch.Tensor) -> torch.Tensor:
    """Rows (scale, gate, scale, gate) of a block without shift, as (shift, scale, gate) twice with a shift of zero."""
    scale_gate = modulation.unflatten(0, (2, 2, -1))
    return torch.cat([torch.zeros_like(scale_gate[:, :1]), scale_gate], dim=1).flatten(0, 2)


def of_manifest(tensors: dict[str, torch.Tensor], case: dict) -> dict[str, torch.Tensor]:
    """Tensors of `build`'s network, such as gradients, in the shapes of theirs: `with_zero_shift` undone."""
    out = dict(tensors)
    for key in tensors:
        if case["config"]["wo_shift"] and key.startswith("blocks.") and "adaLN" in key:
            out[key] = tensors[key].unflatten(0, (2, 3, -1))[:, 1:].flatten(0, 2)
    return out
