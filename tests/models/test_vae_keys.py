"""The VAE's public keys: of any architecture, in the public order, there and back exactly."""

import json

import pytest
import torch

from models.vae import build_vae, vae_models
from models.vae_keys import diffusers_shape, from_ldm, key_pairs, ldm_parameters, ldm_shape, to_ldm
from tests.support.golden_data import GOLDEN

ARCHS = ("f8d4", "f16d32")


TINY = "f4d4-tiny"


MANIFESTS = json.loads((GOLDEN / "manifests.json").read_text())


def manifest(arch):
    return MANIFESTS[f"vae_{arch}"]["state_dict"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_vae(TINY).eval()


CONFIGS = {
    **vae_models,
    "no quant convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no mid attention": {"mid_block_add_attention": False},
    "attention everywhere": {
        "down_block_types": ["AttnDownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2,
    },
    "three layers, grey": {"layers_per_block": 3, "in_channels": 1, "out_channels": 1},
    "equal widths": {"block_out_channels": [32, 32]},
}


@pytest.mark.parametrize("arch", ARCHS)
def test_public_keys_in_public_order(arch):
    with torch.device("meta"):
        vae = build_vae(arch)
    state = to_ldm(vae)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == manifest(arch)
    assert list(state) == list(manifest(arch)) == [key for key, _ in ldm_parameters(vae)]
    assert sum(parameter.numel() for _, parameter in ldm_parameters(vae)) == MANIFESTS[f"vae_{arch}"]["n_params"]


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_of_any_architecture_pair(name):
    base = {
        "latent_channels": 4,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
    }
    with torch.device("meta"):
        vae = build_vae(CONFIGS[name] if name in vae_models else base | CONFIGS[name])
    pairs = key_pairs(vae.config)
    assert sorted(ours for _, ours in pairs) == sorted(vae.state_dict())
    assert len({ldm for ldm, _ in pairs}) == len(pairs)


def test_ldm_round_trip_is_exact(tiny):
    state = tiny.state_dict()
    again = from_ldm(to_ldm(tiny), tiny.config)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    with pytest.raises(KeyError, match="nonsense"):
        from_ldm({**to_ldm(tiny), "nonsense": torch.zeros(1)}, tiny.config)


def test_moments_take_the_shapes_of_their_keys_and_back(tiny):
    shapes = {key: tensor.shape for key, tensor in to_ldm(tiny).items()}
    for key, parameter in ldm_parameters(tiny):
        moment = torch.randn_like(parameter)
        assert ldm_shape(key, moment).shape == shapes[key]
        assert torch.equal(diffusers_shape(key, ldm_shape(key, moment)), moment)
    assert shapes["decoder.mid.attn_1.proj_out.weight"] == (64, 64, 1, 1)
    assert dict(ldm_parameters(tiny))["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64)
