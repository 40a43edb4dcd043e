"""SiT against the public implementation: outputs, losses, gradients, normaliser, state-dict names."""

import json
import math
import zlib

import pytest
import torch

from loss.alignment import alignment_loss
from loss.velocity import velocity_loss
from models.interpolant import interpolate, time_from_draw
from models.sit import LatentNorm, SiT, SiT_models, sincos_positions
from models.sit_files import config_of_state_dict
from tests.support.golden_data import GOLDEN, close, fill, filled, load

REL, ABS = 1e-5, 1e-7
# Of a model in the manifests: what its name does not say.
STORED = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "z_dims", "encoder_depth", "qk_norm")


def build(name):
    arrays, meta = load(name)
    sit = SiT(**meta["config"])
    missing = sit.load_state_dict(filled(meta["manifest"]), strict=False)
    assert missing.missing_keys == ["pos_embed"] and not missing.unexpected_keys
    targets = [torch.from_numpy(arrays[f"in.zs.{i}"]) for i in range(len(meta["config"]["z_dims"]))]
    inputs = [torch.from_numpy(arrays[f"in.{key}"]) for key in ("z", "y", "noises")]
    return sit, arrays, meta, targets, *inputs, torch.from_numpy(arrays["in.time_input"]).flatten()


def full_pass(sit, z, y, noise, t, targets, path, drop=None):
    x_t, target = interpolate(sit.normalize(z), noise, t, path)
    velocity, projections = sit(x_t, t, y, drop)
    return velocity, projections, velocity_loss(velocity, target), alignment_loss(projections, targets)


def check_pass(arrays, prefix, velocity, projections, denoising, alignment):
    if f"{prefix}.model_output" in arrays:
        close(velocity, arrays[f"{prefix}.model_output"], REL, ABS, prefix)
    close(denoising, arrays[f"{prefix}.denoising_loss"], REL, ABS, prefix)
    close(alignment, arrays[f"{prefix}.proj_loss"], REL, ABS, prefix)
    for i, projection in enumerate(projections):
        if f"{prefix}.zs_tilde.{i}" in arrays:
            close(projection, arrays[f"{prefix}.zs_tilde.{i}"], REL, ABS, prefix)


def check_buffers(arrays, prefix, sit):
    stored = [key for key in arrays if key.startswith(prefix) and ".running_" in key]
    assert len(stored) == 2
    for key in stored:
        close(getattr(sit.bn, key.rsplit(".", 1)[1]), arrays[key], REL, ABS, key)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_training_pass_and_gradients_are_those_of_the_public_code(name, path, fused):
    sit, arrays, meta, targets, z, y, noise, t = build(name)
    for block in sit.blocks:
        block.attn.fused_attn = fused
    results = full_pass(sit.train(), z, y, noise, t, targets, path)
    prefix = f"train.{path}"
    check_pass(arrays, prefix, *results)
    check_buffers(arrays, prefix, sit)
    total = results[2].mean() + 0.5 * results[3]
    close(total, arrays[f"{prefix}.total"], REL, ABS)
    total.backward()
    gradients = {key: p.grad for key, p in sit.named_parameters() if p.grad is not None}
    compared = 0
    for key in (k for k in arrays if k.startswith(f"{prefix}.grad.")):
        name_, rows = key.removeprefix(f"{prefix}.grad.").removesuffix(".rows"), key.endswith(".rows")
        gradient = gradients[name_][y] if rows else gradients[name_]
        close(gradient, arrays[key], REL, ABS, key)
        compared += 1
    assert compared > 10
    for key, norm in meta["grad_l2"][path].items():
        if "qkv.bias" not in key and "k_norm.bias" not in key:  # gradients of key biases are rounding noise
            assert abs(gradients[key].double().norm().item() - norm) <= 1e-4 * norm + 1e-8, key


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_evaluation_and_alignment_passes_are_those_of_the_public_code(name, path):
    sit, arrays, _, targets, z, y, noise, t = build(name)
    sit.eval().requires_grad_(False)
    check_pass(arrays, f"eval.{path}", *full_pass(sit, z, y, noise, t, targets, path))

    z.requires_grad_(True)
    x_t, _ = interpolate(sit.normalize(z), noise, t, path)
    projections = sit.project(x_t, t, y)
    loss = alignment_loss(projections, targets)
    loss.backward()
    close(loss, arrays[f"align.{path}.proj_loss"], REL, ABS)
    close(z.grad, arrays[f"align.{path}.grad_z"], REL, ABS)
    assert all(torch.equal(a, b) for a, b in zip(projections, sit(x_t, t, y)[1], strict=True))


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_sampled_time_and_dropped_labels_are_those_of_the_public_code(name, weighting, path):
    sit, arrays, _, targets, z, y, noise, _ = build(name)
    prefix = f"sampled.{weighting}.{path}"
    t = time_from_draw(torch.from_numpy(arrays[f"{prefix}.raw_time_draw"]).flatten(), weighting, path)
    close(t, arrays[f"{prefix}.time_input"].flatten(), 1e-7)
    drop = torch.from_numpy(arrays[f"{prefix}.label_drop_uniform"]) < 0.1
    check_pass(arrays, prefix, *full_pass(sit.train(), z, y, noise, t, targets, path, drop))


@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_inference_and_latent_statistics_are_those_of_the_public_code(name):
    sit, arrays, *_ = build(name)
    sit.eval()
    x, steps, labels = (torch.from_numpy(arrays[f"inference.{key}"]) for key in ("x", "t", "y"))
    close(sit(x, steps.flatten(), labels)[0], arrays["inference.out"], REL, ABS)

    sit.set_latent_stats(*(torch.from_numpy(arrays[f"init_bn.{key}"]) for key in ("latents_scale", "latents_bias")))
    check_buffers(arrays, "init_bn.", sit)
    scale, bias = sit.latent_stats()
    close(scale, arrays["init_bn.out_scale"], REL, ABS)
    close(bias, arrays["init_bn.out_bias"], REL, ABS)


def test_every_public_model_has_the_public_state_dict():
    manifests = json.loads((GOLDEN / "manifests.json").read_text())["sit"]
    for name, facts in manifests.items():
        with torch.device("meta"):
            sit = SiT_models[name.split()[0]](**{key: facts[key] for key in STORED})
        shapes = {key: list(tensor.shape) for key, tensor in sit.state_dict().items()}
        expected = dict(facts["state_dict"])
        if name.startswith("SiT-S"):  # the public S carries a last layer of width 768 and cannot run
            expected = {
                key: [384 if n == 768 else n for n in shape] if key.startswith("final_layer") else shape
                for key, shape in expected.items()
            }
            expected["final_layer.adaLN_modulation.1.weight"] = [768, 384]
            expected["final_layer.adaLN_modulation.1.bias"] = [768]
        assert list(shapes) == list(expected) and shapes == expected, name
        assert next(iter(dict(sit.named_parameters()))) == "pos_embed"


def test_position_table_is_the_public_one():
    arrays, meta = load("sit_a")
    close(sincos_positions(meta["config"]["hidden_size"], 4), arrays["pos_embed"], 1e-7)


def test_config_is_read_back_from_shapes():
    config = dict(input_size=8, patch_size=2, in_channels=4, num_classes=10, class_dropout_prob=0.0)
    config |= dict(hidden_size=192, depth=6, num_heads=3, qk_norm=True, mlp_ratio=4.0)
    config |= dict(z_dims=[16, 24], projector_dim=32)
    state = SiT(encoder_depth=2, **config).state_dict()
    read = config_of_state_dict(state, num_classes=10)
    assert {key: read[key] for key in config} == config
    assert config_of_state_dict(state)["num_classes"] == 9  # without the class count the last row passes for a null row


def test_a_fresh_sit_is_the_identity_of_adaln_zero():
    """Zero gates and a zero last layer: the velocity is exactly zero, the labels play no part yet."""
    sit = SiT_models["SiT-T/2"](input_size=8, z_dims=[16], encoder_depth=3)
    velocity, (projection,) = sit(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert velocity.abs().max() == 0 and projection.shape == (2, 16, 16)


def test_normaliser_equals_torch_batch_norm():
    sit = SiT_models["SiT-T/2"](input_size=8, encoder_depth=3, bn_momentum=0.3)
    oracle = torch.nn.BatchNorm2d(4, eps=1e-4, momentum=0.3, affine=False)
    for _ in range(3):
        z = 3 * torch.randn(5, 4, 8, 8) + 1
        close(sit.train().normalize(z), oracle.train()(z).numpy(), 1e-6)
    close(sit.bn.running_var, oracle.running_var.numpy(), 1e-6)
    assert sit.bn.num_batches_tracked == 3
    close(sit.eval().normalize(z), oracle.eval()(z).numpy(), 1e-6)


def test_a_batch_that_is_not_finite_does_not_move_the_normaliser():
    norm = LatentNorm(3, eps=1e-4, momentum=0.1, affine=False)
    z = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    norm(z)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    z[0, 1, 0, 0], z[0, 2, 0, 0] = math.nan, math.inf
    norm(z)
    for key in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[key][1:], before[key][1:])
        assert norm.state_dict()[key][0] != before[key][0]  # the channel whose values were


def test_filled_weights_are_stable():
    for check in json.loads((GOLDEN / "manifests.json").read_text())["fill_check"]:
        tensor = fill(check["key"], check["shape"])
        assert tensor.flatten()[:4].tolist() == check["first"]
        assert zlib.crc32(tensor.numpy().tobytes()) == check["crc32_of_float32_bytes"], check["key"]
