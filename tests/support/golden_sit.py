"""The golden passes of SiT, on any device."""

import torch

from loss.alignment import alignment_loss
from loss.velocity import velocity_loss
from models.interpolant import interpolate
from models.sit import SiT
from tests.support.golden_data import Tally, filled, load

REL, ABS = 1e-5, 1e-7  # of the CPU


def build(name, device="cpu"):
    """SiT with filled weights, the fixture, and its inputs: targets, z, labels, noise, t."""
    arrays, meta = load(name)
    sit = SiT(**meta["config"])
    missing = sit.load_state_dict(filled(meta["manifest"]), strict=False)
    assert missing.missing_keys == ["pos_embed"] and not missing.unexpected_keys
    names = [f"zs.{i}" for i in range(len(meta["config"]["z_dims"]))]
    *targets, z, y, noise, t = (
        torch.from_numpy(arrays[f"in.{key}"]).to(device) for key in (*names, "z", "y", "noises", "time_input")
    )
    return sit.to(device), arrays, meta, targets, z, y, noise, t.flatten()


def full_pass(sit, z, y, noise, t, targets, path, drop=None):
    x_t, target = interpolate(sit.normalize(z), noise, t, path)
    velocity, projections = sit(x_t, t, y, drop)
    return velocity, projections, velocity_loss(velocity, target), alignment_loss(projections, targets)


def check_pass(tally, arrays, prefix, velocity, projections, denoising, alignment):
    if f"{prefix}.model_output" in arrays:
        tally.close("outputs", velocity, arrays[f"{prefix}.model_output"], REL, ABS, prefix)
    tally.close("losses", denoising, arrays[f"{prefix}.denoising_loss"], REL, ABS, prefix)
    tally.close("losses", alignment, arrays[f"{prefix}.proj_loss"], REL, ABS, prefix)
    for i, projection in enumerate(projections):
        if f"{prefix}.zs_tilde.{i}" in arrays:
            tally.close("outputs", projection, arrays[f"{prefix}.zs_tilde.{i}"], REL, ABS, prefix)


def check_buffers(tally, arrays, prefix, sit):
    stored = [key for key in arrays if key.startswith(prefix) and ".running_" in key]
    assert len(stored) == 2
    for key in stored:
        tally.close("latent statistics", getattr(sit.bn, key.rsplit(".", 1)[1]), arrays[key], REL, ABS, key)


def check_training(name, path, device="cpu", tally=None, *, fused=True):
    """Outputs, losses, statistics and gradients of a training pass."""
    tally = tally or Tally()
    sit, arrays, meta, targets, z, y, noise, t = build(name, device)
    for block in sit.blocks:
        block.attn.fused_attn = fused
    results = full_pass(sit.train(), z, y, noise, t, targets, path)
    prefix = f"train.{path}"
    check_pass(tally, arrays, prefix, *results)
    check_buffers(tally, arrays, prefix, sit)
    total = results[2].mean() + 0.5 * results[3]
    tally.close("losses", total, arrays[f"{prefix}.total"], REL, ABS)
    total.backward()
    gradients = {key: p.grad for key, p in sit.named_parameters() if p.grad is not None}
    compared = 0
    for key in (k for k in arrays if k.startswith(f"{prefix}.grad.")):
        name_, rows = key.removeprefix(f"{prefix}.grad.").removesuffix(".rows"), key.endswith(".rows")
        gradient = gradients[name_][y] if rows else gradients[name_]
        tally.close("gradients", gradient, arrays[key], REL, ABS, key)
        compared += 1
    assert compared > 10
    for key, norm in meta["grad_l2"][path].items():
        if "qkv.bias" not in key and "k_norm.bias" not in key:  # gradients of key biases are rounding noise
            tally.within("gradient norms", abs(gradients[key].double().norm().item() - norm), 1e-4 * norm + 1e-8, key)


def check_frozen(name, path, device="cpu", tally=None):
    """The evaluation pass, and the alignment pass with its gradient in z."""
    tally = tally or Tally()
    sit, arrays, _, targets, z, y, noise, t = build(name, device)
    sit.eval().requires_grad_(False)
    check_pass(tally, arrays, f"eval.{path}", *full_pass(sit, z, y, noise, t, targets, path))

    z.requires_grad_(True)
    x_t, _ = interpolate(sit.normalize(z), noise, t, path)
    projections = sit.project(x_t, t, y)
    loss = alignment_loss(projections, targets)
    loss.backward()
    tally.close("losses", loss, arrays[f"align.{path}.proj_loss"], REL, ABS)
    tally.close("gradients", z.grad, arrays[f"align.{path}.grad_z"], REL, ABS)
    assert all(torch.equal(a, b) for a, b in zip(projections, sit(x_t, t, y)[1], strict=True))
