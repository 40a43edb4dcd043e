"""SiT against the public implementation: outputs, losses, gradients, normaliser, state-dict names."""

import json
import math
import zlib

import pytest
import torch

from models.interpolant import time_from_draw
from models.sit import LatentNorm, SiT, SiT_models, sincos_positions
from models.sit_files import config_of_state_dict
from tests.support.golden_data import GOLDEN, Tally, close, fill, load
from tests.support.golden_sit import ABS, REL, build, check_buffers, check_frozen, check_pass, check_training, full_pass

# Of a model in the manifests: what its name does not say.
STORED = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "z_dims", "encoder_depth", "qk_norm")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_training_pass_and_gradients_are_those_of_the_public_code(name, path, fused):
    check_training(name, path, fused=fused)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_evaluation_and_alignment_passes_are_those_of_the_public_code(name, path):
    check_frozen(name, path)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_sampled_time_and_dropped_labels_are_those_of_the_public_code(name, weighting, path):
    sit, arrays, _, targets, z, y, noise, _ = build(name)
    prefix = f"sampled.{weighting}.{path}"
    t = time_from_draw(torch.from_numpy(arrays[f"{prefix}.raw_time_draw"]).flatten(), weighting, path)
    close(t, arrays[f"{prefix}.time_input"].flatten(), 1e-7)
    drop = torch.from_numpy(arrays[f"{prefix}.label_drop_uniform"]) < 0.1
    check_pass(Tally(), arrays, prefix, *full_pass(sit.train(), z, y, noise, t, targets, path, drop))


@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_inference_and_latent_statistics_are_those_of_the_public_code(name):
    sit, arrays, *_ = build(name)
    sit.eval()
    x, steps, labels = (torch.from_numpy(arrays[f"inference.{key}"]) for key in ("x", "t", "y"))
    close(sit(x, steps.flatten(), labels)[0], arrays["inference.out"], REL, ABS)

    sit.set_latent_stats(*(torch.from_numpy(arrays[f"init_bn.{key}"]) for key in ("latents_scale", "latents_bias")))
    check_buffers(Tally(), arrays, "init_bn.", sit)
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


@pytest.mark.parametrize("blocks", [dict(qk_norm=True), dict(lightning=True), dict(qk_norm=True, lightning=True)])
def test_config_is_read_back_from_shapes(blocks):
    config = dict(input_size=8, patch_size=2, in_channels=4, num_classes=10, class_dropout_prob=0.0)
    config |= dict(hidden_size=192, depth=6, num_heads=4, qk_norm=False, mlp_ratio=4.0, lightning=False) | blocks
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
