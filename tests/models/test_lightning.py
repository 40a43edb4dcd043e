"""LightningDiT against the public implementation: outputs, gradients, tables, norms, state-dict names."""

import json
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models.lightning import RMSNorm, RotaryPositions, rotate
from models.sit import SiT, SiT_models
from tests.support.golden_data import GOLDEN, Tally, close, fill, load
from tests.support.golden_lightning import ABS, REL, build, of_manifest

NETWORK, META = load("options/ldit_net")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", META["cases"])
def test_the_network_and_its_gradients_are_those_of_the_public_code(name, fused):
    """`plain` has neither RMSNorm, SwiGLU nor RoPE: it is our SiT with qk-norm."""
    case, tally = META["cases"][name], Tally()
    sit = build(case).eval()
    arrays = {key.removeprefix(f"{name}."): value for key, value in NETWORK.items() if key.startswith(f"{name}.")}
    x, s, labels, target = (torch.from_numpy(arrays[f"in.{key}"]) for key in ("x", "t", "y", "target"))
    taps = {"t_emb": sit.t_embedder, "y_emb": sit.y_embedder, "block0.attn": sit.blocks[0].attn}
    taps |= {"block0.mlp": sit.blocks[0].mlp} | {f"block{i}": block for i, block in enumerate(sit.blocks)}
    tapped = {}
    for tap, module in taps.items():
        module.register_forward_hook(lambda module, inputs, output, tap=tap: tapped.update({tap: output}))
    for block in sit.blocks:
        block.attn.fused_attn = fused

    # Their network is the same function of their time s = 1 - t.
    velocity, _ = sit(x.requires_grad_(True), s, labels)
    loss = (velocity - target).square().mean()
    loss.backward()
    tally.close("outputs", velocity, arrays["out"], REL, ABS)
    tally.close("outputs", loss, arrays["loss"], REL, ABS)
    tally.close("gradients", x.grad, arrays["grad_x"], REL, ABS)
    for tap, output in tapped.items():
        tally.close("taps", output, arrays[f"tap.{tap}"], REL, ABS, tap)
    assert tapped.keys() == {key.removeprefix("tap.") for key in arrays if key.startswith("tap.")}

    gradients = of_manifest({key: p.grad for key, p in sit.named_parameters() if p.grad is not None}, case)
    unlike = {*case["zero_gradient_keys"], *(key for key in gradients if name == "plain" and "qkv.bias" in key)}
    stored = {key.removeprefix("grad."): value for key, value in arrays.items() if key.startswith("grad.")}
    assert {key.removesuffix(".rows") for key in stored} == gradients.keys()
    for key, expected in stored.items():
        gradient = gradients[key.removesuffix(".rows")]
        if key.removesuffix(".rows") not in unlike:
            tally.close("gradients", gradient[labels] if key.endswith(".rows") else gradient, expected, REL, ABS, key)
    for key, norm in case["grad_l2"].items():
        if norm is not None and key not in unlike:
            tally.within("gradients", abs(gradients[key].norm().item() - norm), REL * norm + ABS, key)


@pytest.mark.parametrize("name", ["full", "qknorm"])
def test_tables_are_the_public_ones(name):
    sit = build(META["cases"][name])
    for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        close(sit.state_dict()[key], NETWORK[f"{name}.{key}"], 0, 5e-7)


def test_norms_of_small_inputs_where_eps_decides():
    x = torch.from_numpy(NETWORK["norm.in"])
    for name, facts in META["norms"].items():
        kind, part = name.split(".")
        shape = dict(input_size=4, hidden_size=16, num_heads=1, depth=1, encoder_depth=1)
        sit = SiT(**shape, qk_norm=True, lightning=kind == "rms")
        block = sit.blocks[0]
        norm = dict(norm1=block.norm1, q_norm=block.attn.q_norm, norm_final=sit.final_layer.norm_final)[part]
        norm.load_state_dict(
            {key: fill(stored["fill_key"], stored["shape"]) for key, stored in facts["weights"].items()}
        )
        assert norm.eps == facts["eps"]
        close(norm(x), NETWORK[f"norm.{name}.out"], REL, ABS)


def test_every_public_model_has_the_public_state_dict():
    manifests = json.loads((GOLDEN / "options" / "ldit_manifests.json").read_text())
    for name, facts in manifests["models"].items():
        with torch.device("meta"):
            config = {key: facts["config"][key] for key in ("input_size", "in_channels", "num_classes")}
            sit = SiT_models[name.split()[0]](**config, z_dims=())
        shapes = {key: list(tensor.shape) for key, tensor in sit.state_dict().items() if not key.startswith("bn.")}
        assert list(shapes.items()) == [(key, list(shape)) for key, shape in facts["state_dict"].items()], name
        assert sum(parameter.numel() for parameter in sit.parameters()) == facts["parameters"]
    for name, facts in manifests["presets"].items():
        if name in SiT_models:
            config = SiT_models[name].keywords
            assert config["patch_size"] == facts["patch_size"] and config["num_heads"] == facts["num_heads"]
            assert int(2 / 3 * 4 * config["hidden_size"]) == facts["swiglu_width"]
    assert len(manifests["presets"].keys() & SiT_models.keys()) == 5  # the two of a billion and more are not built


def test_a_checkpoint_of_theirs_has_our_names_in_our_order():
    """Of a network of two blocks; ours ends with the latents' normaliser."""
    stored = json.loads((GOLDEN / "options" / "ldit_checkpoint.json").read_text())
    shape = dict(input_size=4, patch_size=1, hidden_size=48, num_heads=3, depth=2, num_classes=10)
    sit = SiT(**shape, encoder_depth=1, z_dims=(), lightning=True)
    keys = [key for key in sit.state_dict() if not key.startswith("bn.")]
    assert [stored[weights]["keys"] for weights in ("model", "ema")] == [len(keys)] * 2
    assert keys[:4] == stored["model"]["first"] and keys[-4:] == stored["model"]["last"]
    assert [name for name, _ in sit.named_parameters()] == stored["opt"]["names_in_order"]


def test_scores_depend_on_the_distance_of_two_tokens_alone():
    grid, width = 5, 8
    positions = RotaryPositions(width, grid)
    q, k = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    q, k = (rotate(x.expand(grid**2, -1), positions.freqs_cos, positions.freqs_sin) for x in (q, k))
    scores = (q @ k.T).reshape(grid, grid, grid, grid)  # of (row, column) with (row, column)
    torch.testing.assert_close(scores[0, 1, 2, 3], scores[2, 0, 4, 2])
    torch.testing.assert_close(scores[:, 0, :, 0].diagonal(1), scores[0, 0, 1, 0].expand(grid - 1))
    assert (scores[0, 1, 2, 3] - scores[0, 2, 2, 3]).abs() > 1e-3
    with pytest.raises(ValueError, match="multiple of 4 channels, not 6"):
        RotaryPositions(6, grid)


def test_the_norm_of_half_inputs_is_computed_in_float32():
    norm, x = RMSNorm(16, eps=1e-6), 300 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x.half()), norm(x.half().float()), rtol=1e-3, atol=1e-3)  # squares overflow fp16


def test_blocks_compile_whole_and_share_their_code(monkeypatch):
    counter = CompileCounter()  # an error where a block is not one graph
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    sit = build(META["cases"]["qknorm"]).eval()
    x, s, labels = (torch.from_numpy(NETWORK[f"qknorm.in.{key}"]) for key in ("x", "t", "y"))
    sit.compile_blocks()
    close(sit(x, s, labels)[0], NETWORK["qknorm.out"], REL, ABS)
    assert counter.frame_count == 1


def test_a_fresh_lightning_dit_is_the_identity_of_adaln_zero():
    sit = SiT_models["LightningDiT-T/2"](input_size=8, z_dims=[16], encoder_depth=3)
    velocity, (projection,) = sit(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert velocity.abs().max() == 0 and projection.shape == (2, 16, 16)
    assert all((parameter == 1).all() for key, parameter in sit.named_parameters() if "norm" in key)
