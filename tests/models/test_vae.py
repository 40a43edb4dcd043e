"""The VAE: parity with the public implementation, its files, errors, stored latent statistics."""

import json

import pytest
import safetensors.torch
import torch

from models.posterior import (
    TrainableVAE,
    decode,
    encode_moments,
    kl,
    split_moments,
    to_mean_std,
)
from models.vae import build_vae, downsampling, latent_statistics, load_vae, vae_config
from models.vae_files import save_vae_files
from models.vae_keys import ldm_parameters, ldm_shape, to_ldm
from tests.golden.fill import synth_image
from tests.support.golden_data import GOLDEN, close, filled, load
from utils.errors import InputError
from utils.images import to_signed

ARCHS = ("f8d4", "f16d32")
TINY = "f4d4-tiny"
MANIFESTS = json.loads((GOLDEN / "manifests.json").read_text())


def manifest(arch):
    return MANIFESTS[f"vae_{arch}"]["state_dict"]


@pytest.fixture(scope="module", params=ARCHS)
def golden(request, tmp_path_factory):
    """A full-size VAE loaded from a public-form file, and the fixture's arrays."""
    file = tmp_path_factory.mktemp("vae") / f"{request.param}.pt"
    state = filled(manifest(request.param))
    torch.save(state, file)
    vae = load_vae(request.param, file)
    assert all(torch.equal(tensor, state[key]) for key, tensor in to_ldm(vae).items())
    return vae, *load(f"vae_{request.param}")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_vae(TINY).eval()


@pytest.fixture
def saved(tiny, tmp_path):
    """The folder that save_vae_files writes for the tiny VAE, with its statistics."""
    scale, bias = torch.rand(1, 4, 1, 1) + 0.5, torch.randn(1, 4, 1, 1)
    return save_vae_files(tmp_path, "my-vae", tiny, scale, bias), scale, bias


# Parity


def test_forward_and_gradients_are_those_of_the_public_code(golden):
    vae, arrays, meta = golden
    vae.zero_grad()
    pixels = to_signed(torch.from_numpy(arrays["in.image_u8"]))
    moments, z, reconstruction = TrainableVAE(vae)(pixels, torch.from_numpy(arrays["in.eps"]))
    mean, logvar = split_moments(moments)
    std = to_mean_std(moments).chunk(2, dim=1)[1]
    found = {"mean": mean, "logvar": logvar, "std": std, "kl": kl(moments), "z": z, "recon": reconstruction}
    for name, tensor in found.items():
        close(tensor, arrays[name], 2e-5, what=name)

    l1 = (pixels - reconstruction).abs().mean()
    close(l1, arrays["l1"], 2e-5, what="l1")
    l1.backward()
    gradients = {key: ldm_shape(key, parameter.grad) for key, parameter in ldm_parameters(vae)}
    for name in meta["grad_names"]:
        close(gradients[name], arrays[f"grad.{name}"], 5e-5, what=name)
    for name, expected in meta["grad_l2"].items():
        if not name.endswith("k.bias"):  # mathematically zero
            assert gradients[name].norm().item() == pytest.approx(expected, rel=5e-4), name


@torch.no_grad()
def test_decoder_and_clamped_posterior_are_those_of_the_public_code(golden):
    vae, arrays, _ = golden
    close(decode(vae, torch.from_numpy(arrays["decode.z"])), arrays["decode.out"], 2e-5)

    class Constant(torch.nn.Module):
        def forward(self, _):
            return torch.from_numpy(arrays["gauss.moments"])

    stub = type("Stub", (), {"encoder": Constant(), "quant_conv": None})()
    moments = encode_moments(stub, None)
    close(split_moments(moments)[1], arrays["gauss.logvar"], 1e-6)
    close(to_mean_std(moments).chunk(2, dim=1)[1], arrays["gauss.std"], 1e-6)
    close(kl(moments), arrays["gauss.kl"], 2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_256_pixels_are_those_of_the_public_code(golden):
    vae, arrays, meta = golden
    if "image256" not in meta:
        pytest.skip("this fixture has no 256 x 256 image")
    image = torch.from_numpy(synth_image(256, 256, meta["image256"]["seed"])).permute(2, 0, 1)[None]
    moments = encode_moments(vae, to_signed(image))
    mean, logvar = split_moments(moments)
    found = {"mean": mean, "logvar": logvar, "kl": kl(moments), "decode_of_mean": decode(vae, mean)}
    for name, tensor in found.items():
        close(tensor, arrays[f"big.{name}"], 2e-5, what=name)


def test_a_stored_config_rebuilds_the_network(tiny):
    config = json.loads(json.dumps(vae_config(tiny)))
    again = build_vae(config)
    again.load_state_dict(tiny.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(encode_moments(again, pixels), encode_moments(tiny, pixels))
    assert again.config.norm_num_groups == 8 and downsampling(again) == downsampling(config) == 4


# Files


def equal_weights(one, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other[key]) for key, tensor in one.state_dict().items())


def test_every_public_form_of_file_loads(tiny, saved, tmp_path):
    folder, *_ = saved
    wrapped = {
        "epoch": 3,
        "state_dict": {**to_ldm(tiny), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)},
    }
    torch.save(wrapped, tmp_path / "training.ckpt")
    safetensors.torch.save_file({k: v.contiguous() for k, v in to_ldm(tiny).items()}, tmp_path / "ldm.safetensors")
    (tmp_path / "pipeline").mkdir()
    (folder / "diffusers").rename(tmp_path / "pipeline" / "vae")
    weights = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    files = [folder / "my-vae.pt", tmp_path / "training.ckpt", tmp_path / "ldm.safetensors", tmp_path / "pipeline"]
    for path in [*files, weights]:
        vae = load_vae(TINY, path)
        assert equal_weights(tiny, vae), path
        assert not vae.training and next(vae.parameters()).requires_grad
    for path in files:  # shapes do not show the groups of the norms: the preset does
        assert load_vae("auto", path).config.norm_num_groups == 8


def test_half_precision_files_become_float32(tiny, tmp_path):
    torch.save({key: tensor.half() for key, tensor in to_ldm(tiny).items()}, tmp_path / "half.pt")
    vae = load_vae(TINY, tmp_path / "half.pt")
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_loading_leaves_the_random_state(saved):
    before = torch.get_rng_state()
    load_vae(TINY, saved[0] / "my-vae.pt")
    assert torch.equal(torch.get_rng_state(), before)


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


NINE = {"decoder.conv_out.weight": torch.zeros(9, 16, 3, 3)}  # channels of an image
BAD_STATES = {
    "lacks the key 'quant_conv.bias', which --vae f4d4-tiny needs": lambda s: without(s, "quant_conv.bias"),
    "has the key 'extra.weight', which": lambda s: {**s, "extra.weight": torch.zeros(1)},
    r"has 'decoder.conv_out.weight' of shape \(9, 16, 3, 3\); --vae f4d4-tiny needs \(3, 16, 3, 3\)": lambda s: (
        s | NINE
    ),
    "lacks the key 'decoder.conv_in.weight'": lambda s: {"weight": torch.zeros(1)},
    "'encoder.conv_in.bias' is a str": lambda s: {**s, "encoder.conv_in.bias": "text"},
    "holds 2 VAEs, under 'model', 'vae'; a file with one is needed": lambda s: {"model": s, "vae": s},
    "holds a decoder under 'teacher.', a prefix that no": lambda s: {f"teacher.{k}": v for k, v in s.items()},
    "has the key 'encoder.conv_in.bias' twice": lambda s: {**s, "encoder.module.conv_in.bias": torch.zeros(16)},
}


@pytest.mark.parametrize("message", BAD_STATES)
def test_another_state_dict_is_refused_with_its_key(message, tiny, tmp_path):
    torch.save(BAD_STATES[message](to_ldm(tiny)), tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as error:
        load_vae(TINY, tmp_path / "x.pt")
    assert str(error.value).startswith(f"--vae-ckpt: {tmp_path / 'x.pt'}") and "\n" not in str(error.value)


def test_another_architecture_is_named(saved):
    folder, *_ = saved
    for path in (folder / "my-vae.pt", folder / "diffusers"):
        with pytest.raises(InputError, match=f"--vae-ckpt: {path} has 4 latent channels; --vae f16d32 needs 32"):
            load_vae("f16d32", path)
        with pytest.raises(InputError, match="downsamples by 4; --arch f8d4 needs 8"):
            load_vae("f8d4", path, flags=("--arch", "--file"))


def test_damaged_and_missing_files_are_refused(saved, tmp_path):
    folder, *_ = saved
    whole = (folder / "my-vae.pt").read_bytes()
    for name, contents in {"cut.pt": whole[: len(whole) // 2], "page.pt": b"<!DOCTYPE html>", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=f"--vae-ckpt: .*{name} .*(truncated|no torch)"):
            load_vae(TINY, tmp_path / name)
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match=r"no readable \.safetensors file"):
        load_vae(TINY, tmp_path / "page.safetensors")
    with pytest.raises(InputError, match=r"missing.pt does not exist; .*hf download"):
        load_vae("f8d4", tmp_path / "missing.pt")


def test_a_folder_loads_strictly(saved, tmp_path):
    folder = saved[0] / "diffusers"
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)

    safetensors.torch.save_file(without(state, "quant_conv.bias"), weights)
    with pytest.raises(InputError, match=r"missing key 'quant_conv\.bias'"):  # diffusers would draw it at random
        load_vae("auto", folder)
    safetensors.torch.save_file({**state, "extra": torch.zeros(1)}, weights)
    with pytest.raises(InputError, match="unexpected key 'extra'"):
        load_vae("auto", folder)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_vae("auto", folder)
    config.write_text('{"_class_name": "VQModel"}')
    with pytest.raises(InputError, match="holds a VQModel"):
        load_vae("auto", folder)
    config.unlink()
    with pytest.raises(InputError, match=r"no diffusers folder: a config.json"):
        load_vae("auto", folder)


# Statistics of the latents


def test_statistics_stored_beside_the_vae_are_found(saved, tmp_path):
    folder, scale, bias = saved
    for path in (folder / "my-vae.pt", folder / "diffusers"):
        found = latent_statistics(path, load_vae("auto", path))
        assert torch.equal(found[0], scale) and torch.equal(found[1], bias), path
    lonely = tmp_path / "lonely.pt"
    lonely.write_bytes((folder / "my-vae.pt").read_bytes())
    vae = load_vae(TINY, lonely)
    assert latent_statistics(lonely, vae) is None

    theirs = {"mean": bias, "std": 1 / scale}  # LightningDiT's latents_stats.pt
    torch.save(theirs, tmp_path / "lonely-latents-stats.pt")
    found = latent_statistics(lonely, vae)
    torch.testing.assert_close(found, (scale, bias))

    wide = {"latents_scale": torch.ones(1, 32, 1, 1), "latents_bias": torch.ones(32)}
    for message, contents in {
        "statistics of 32 channels; the VAE has 4": wide,
        "not positive": {"latents_scale": torch.zeros(1, 4, 1, 1), "latents_bias": torch.ones(1, 4, 1, 1)},
        "lacks 'latents_scale'": {"scale": torch.ones(4)},
        "no tensors": theirs | {"mean": 0.0},
    }.items():
        torch.save(contents, tmp_path / "lonely-latents-stats.pt")
        with pytest.raises(InputError, match=message):
            latent_statistics(lonely, vae)
