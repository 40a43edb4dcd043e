"""The frozen encoders: parity with the public code, the flags, the module, any ViT of timm."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models import encoders
from models.encoder_table import ENCODERS
from models.encoder_weights import to_timm_state
from models.encoders import Encoder, build, encoder_dims, load_encoder, load_encoders, parse_encoder_list, resize_tokens
from tests.support import encoder_weights as public
from tests.support.encoder_weights import cases, images, manifest, public_checkpoint, refusal, use_small_encoders
from tests.support.golden_data import GOLDEN
from utils.files import sha256

CASES = cases()["cases"]
THROUGH_A_FILE = {"dinov2reg-vit-b", "mocov3-vit-s", "clip-vit-L", "jepa-vit-h", "mae-vit-l"}  # one of every layout


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "encoders/golden.npz") as arrays:
        return dict(arrays)


# The rule of the fixtures


def test_the_fill_rule_gives_the_bytes_of_the_fixtures():
    for name, check in cases()["fill_checks"].items():
        assert hashlib.sha256(public.fill(name, check["shape"]).numpy().tobytes()).hexdigest() == check["sha256"], name
    for resolution, check in cases()["image"].items():
        assert hashlib.sha256(images(int(resolution)).numpy().tobytes()).hexdigest() == check["sha256"]


# Parity with the public code


def golden_encoder(monkeypatch, name, resolution, depth, checkpoint) -> Encoder:
    """`load_encoder` on a checkpoint in memory."""

    def load_network(spec, resolution, _):
        network = build(spec, resolution, depth)
        network.load_state_dict(to_timm_state(spec, checkpoint, network, "memory"), assign=True)
        return network

    monkeypatch.setattr(encoders, "load_network", load_network)
    return load_encoder(name, resolution)


def golden_encoder_from_file(monkeypatch, tmp_path, name, resolution) -> Encoder:
    """`load_encoder` on a depth-2 file in the public format; for CLIP its own checksum stands for the published one."""
    path = public.write_public_file(name, tmp_path)
    spec = ENCODERS[name]
    if spec.sha256:
        spec = dataclasses.replace(spec, sha256=sha256(path))
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(spec, depth=2))
    return load_encoder(name, resolution, str(path))


def check_case(golden, case: str, encoder: Encoder, atol: float) -> None:
    facts, stored = CASES[case], {}
    prefix, tokens, dims = facts["prefix_tokens"], facts["tokens"], facts["dims"]
    network = encoder.network
    for module, name, skip in ((network.patch_embed, "patch", 0), (network.blocks[0], "block0", prefix)):
        module.register_forward_hook(lambda m, i, out, name=name, skip=skip: stored.update({name: out[:, skip:]}))
    batch = images(facts["resolution"])
    features = encoder(batch)
    assert list(features.shape) == facts["shape"] and features.shape[1] == encoder.grid**2
    found = {
        "input": encoder.preprocess(batch)[..., ::37, ::37],
        **{name: stored[name][:, tokens, :dims] for name in ("patch", "block0")},
        "features": features[:, tokens, :dims],
        "token_mean": features[:, :: features.shape[1] // 64].mean(2),
    }
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, golden[f"{case}/{name}"], rtol=0, atol=atol, err_msg=f"{case}/{name}")
    stats = facts["stats"]
    whole = {"mean": features.mean(), "std": features.std(correction=0), "abs_mean": features.abs().mean()}
    for name, value in whole.items():
        assert abs(value.item() - stats[name]) < 1e-5, (name, value.item(), stats[name])


@pytest.mark.parametrize("case", [case for case, facts in CASES.items() if not facts["full"]])
def test_two_blocks_equal_the_public_code(case, golden, monkeypatch, tmp_path):
    name, resolution = CASES[case]["encoder"], CASES[case]["resolution"]
    if name in THROUGH_A_FILE:
        encoder = golden_encoder_from_file(monkeypatch, tmp_path, name, resolution)
    else:
        encoder = golden_encoder(monkeypatch, name, resolution, 2, public_checkpoint(name))
    check_case(golden, case, encoder, atol=2e-5)
    eps = manifest()[name]["eps"]
    assert {module.eps for module in encoder.network.modules() if isinstance(module, nn.LayerNorm)} == {eps}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, facts in CASES.items() if facts["full"]])
def test_whole_networks_equal_the_public_code(case, golden, monkeypatch):
    name = CASES[case]["encoder"]
    encoder = golden_encoder(monkeypatch, name, CASES[case]["resolution"], None, public_checkpoint(name, None))
    check_case(golden, case, encoder, atol=5e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_key_of_the_real_file_has_its_place(name):
    """Names and shapes of the public file at full depth, with all that lies beside the encoder; no memory is needed."""
    spec, entry = ENCODERS[name], manifest()[name]
    assert (spec.width, spec.depth, spec.heads, spec.patch) == tuple(
        entry[key] for key in ("embed_dim", "depth", "num_heads", "patch")
    )
    state = {key: torch.zeros(()).expand(s) for key, s in (entry["keys_full"] | entry["distractor_keys"]).items()}
    for wrapper in entry["wrap"]:
        state = {wrapper: state}
    for resolution in (256, 512):
        network = build(spec, resolution)
        converted = to_timm_state(spec, state, network, "memory")
        assert {key: t.shape for key, t in converted.items()} == {k: t.shape for k, t in network.state_dict().items()}
        network.blocks = network.blocks[:1]  # each block keeps the shape
        side = resolution // 16 * spec.patch
        tokens = network.forward_features(torch.empty(1, 3, side, side, device="meta"))[:, spec.prefix_tokens :]
        assert tokens.shape == (1, spec.grid(resolution) ** 2, spec.width)
    assert encoder_dims(name) == spec.width


# The flags


def test_comma_lists_pair_names_with_files():
    assert parse_encoder_list(None) == parse_encoder_list("None") == parse_encoder_list("") == []
    assert parse_encoder_list("dinov2-vit-b, timm:local-dir:/a:b") == [
        ("dinov2-vit-b", None),
        ("timm:local-dir:/a:b", None),
    ]
    assert parse_encoder_list("clip-vit-L,mae-vit-l", ",x.pth") == [("clip-vit-L", None), ("mae-vit-l", "x.pth")]
    refusal(lambda: parse_encoder_list("dinov2-vit-x"), "--enc-type", "'dinov2-vit-x'", *ENCODERS, "timm:NAME")
    refusal(lambda: parse_encoder_list("dinov2-vit-b,"), "--enc-type: ''")
    refusal(lambda: parse_encoder_list("dinov2-vit-b,None"), "--enc-type: 'None'")
    refusal(lambda: parse_encoder_list("timm:"), "--enc-type: 'timm:'")
    refusal(lambda: parse_encoder_list("dinov2-vit-b", "a.pth,b.pth"), "--enc-ckpt: 2 file(s)", "needs 1")
    refusal(lambda: parse_encoder_list("None", "a.pth"), "--enc-ckpt: 1 file(s)", "needs 0")
    refusal(lambda: load_encoder("resnet"), "--enc-type: 'resnet'")


@pytest.mark.parametrize("resolution", [250, 8])
def test_a_resolution_without_a_whole_grid_is_refused(resolution):
    refusal(lambda: load_encoder("dinov2-vit-b", resolution), f"--resolution: {resolution}", "multiple of 16")


def test_the_command_line_lists_and_refuses(capsys):
    encoders.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ENCODERS)
    for argv, needle in ((["download"], "no name"), (["download", "resnet"], "'resnet'"), (["fetch"], "fetch")):
        with pytest.raises(SystemExit) as caught:
            encoders.main(argv)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and needle in error and error.count("\n") == 1


def test_the_documentation_lists_every_record():
    rows = [line.split("|") for line in Path("docs/encoders.md").read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): (int(row[2]), row[3].strip(" `"), float(row[4]), row[5]) for row in rows}
    assert list(listed) == list(ENCODERS)
    for name, spec in ENCODERS.items():
        assert listed[name][:3] == (spec.width, spec.file, spec.size_gb)
        assert f"({spec.url or spec.page})" in listed[name][3]


# The module


@pytest.mark.parametrize("name", ["dinov2-vit-b", "clip-vit-L", "mocov3-vit-s"])  # one of each preprocessing
def test_an_encoder_is_frozen_and_its_tokens_take_part_in_losses(name, monkeypatch):
    use_small_encoders(monkeypatch)
    encoder = load_encoder(name, 64)
    outer = nn.ModuleList([encoder]).train()
    assert outer.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    tokens = encoder(images(64))
    assert tokens.shape == (2, 16, encoder.embed_dim) and tokens.dtype == torch.float32 and encoder.grid == 4
    projections = torch.randn(2, 16, encoder.embed_dim, requires_grad=True)
    (projections * tokens).sum().backward()
    torch.testing.assert_close(projections.grad, tokens)

    dtypes = []
    hook = encoder.network.blocks[1].mlp.fc1.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images(64))
    hook.remove()
    assert dtypes == [torch.bfloat16] and half.dtype == torch.float32
    assert 0 < (half - tokens).abs().max() < 0.1 * tokens.abs().max()

    encoder.compile_blocks()
    torch.testing.assert_close(encoder(images(64)), tokens)


def test_preprocessing_keeps_the_images_and_the_overshoot(monkeypatch):
    use_small_encoders(monkeypatch)
    encoder = load_encoder("clip-vit-L", 64)
    batch = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    batch[..., 32:] = 255
    kept = batch.clone()
    pixels = encoder.preprocess(batch)
    assert torch.equal(batch, kept) and pixels.shape == (1, 3, 56, 56)
    assert (pixels > (1 - encoder.mean) / encoder.std + 0.01).any()  # bicubic overshoot at the edge, not clamped


def test_resized_tokens_keep_rows_and_columns():
    tokens = torch.randn(2, 16, 5, dtype=torch.bfloat16)
    assert resize_tokens(tokens, 4) is tokens
    ramp = torch.arange(6.0).expand(6, 6).reshape(1, 36, 1)  # value = column
    halved = resize_tokens(ramp, 3).view(3, 3)
    torch.testing.assert_close(halved, torch.tensor([0.5, 2.5, 4.5]).expand(3, 3))  # rows stay rows
    doubled = resize_tokens(tokens, 8)
    oracle = F.interpolate(tokens.float().permute(0, 2, 1).reshape(2, 5, 4, 4), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(doubled, oracle.reshape(2, 5, 64).permute(0, 2, 1))
    with pytest.raises(AssertionError):
        resize_tokens(tokens[:, :15], 4)


# timm's ViTs

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
TIMM_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def write_local_dir(folder: Path, num_classes: int, **changes) -> nn.Module:
    """A small ViT in timm's folder format, as examples/digits saves its own."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, **TINY).eval()
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": num_classes}
    config |= {"pretrained_cfg": TIMM_CFG, "model_args": TINY}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    return network


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_timm_folder_gives_the_tokens_of_its_network(num_classes, tmp_path):
    network = write_local_dir(tmp_path / "vit", num_classes)
    name = f"timm:local-dir:{tmp_path}/vit"
    assert encoder_dims(name) == 96
    (encoder,) = load_encoders(name, 32)
    assert (encoder.grid, encoder.input_size, encoder.embed_dim) == (8, 32, 96)
    batch = images(32)
    mean, std = (torch.tensor(TIMM_CFG[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((batch / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(encoder(batch), expected)
    assert encoder.interpolation == "bilinear"
    assert not isinstance(encoder.network.head, nn.Linear)

    larger = load_encoder(name, 50)  # 12.5 patches: 12 or 13, positions resampled
    assert larger.input_size == larger.grid * 4 and larger(images(50)).shape == (2, larger.grid**2, 96)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_timm_encoder_takes_a_file_of_ones_own(suffix, num_classes, tmp_path):
    write_local_dir(tmp_path / "vit", 10)
    torch.manual_seed(1)
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, **TINY).state_dict()
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".pt" else state, path)
    name = f"timm:local-dir:{tmp_path}/vit"
    loaded = load_encoder(name, 32, str(path)).network.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("head.")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())

    state.pop("norm.weight")
    torch.save(state, tmp_path / "lacking.pt")
    refusal(lambda: load_encoder(name, 32, str(tmp_path / "lacking.pt")), name, "norm.weight")
    refusal(lambda: load_encoder(name, 32, str(tmp_path / "no.pt")), "--enc-ckpt", "no.pt")


def test_timm_models_that_cannot_serve_are_refused(tmp_path, monkeypatch):
    refusal(lambda: encoder_dims("timm:no_such_model"), "--enc-type: timm:no_such_model", "Unknown model")
    refusal(lambda: encoder_dims("timm:resnet18"), "timm:resnet18", "(1, 512, 7, 7)", "(B, prefix + N, D)")
    refusal(lambda: encoder_dims("timm:swin_tiny_patch4_window7_224"), "(1, 7, 7, 768)")
    refusal(lambda: load_encoder("timm:vit_tiny_patch16_224_no", 32), "Unknown model")
    # Never random weights in silence: an architecture without any, a folder without its file.
    refusal(lambda: load_encoder("timm:test_vit4", 160), "did not get its weights", "No pretrained weights exist")
    write_local_dir(tmp_path / "vit", 0)
    (tmp_path / "vit/model.safetensors").unlink()
    refusal(
        lambda: load_encoder(f"timm:local-dir:{tmp_path}/vit", 32), "did not get its weights", "No suitable checkpoints"
    )
