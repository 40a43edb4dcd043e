"""Weights that are broken or made to do harm: what is whole is loaded, the rest is a line, and nothing runs."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.discriminator import load_discriminator
from models.encoder_weights import read_weights
from models.sit import SiT
from models.sit_files import find_sit_state
from models.vae import latent_statistics, load_vae, vae_by_shape
from tests.support.hostile import FEW, Planted, another_state, broken, broken_json, outcome
from tests.support.refusals import refusal
from tests.support.small import write_vae
from utils.torch_files import read_torch_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_vae(folder)
    shutil.copytree(folder / "vae" / "diffusers", folder / "diffusers")
    return folder


@pytest.fixture(scope="module")
def state(folder):
    return torch.load(folder / "vae" / "vae.pt")


# Tensors of other shapes, under other names

SIZE = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3)
SIT = SiT(**SIZE, encoder_depth=1, z_dims=[8], projector_dim=16).state_dict()
LAST = {f"final_layer.linear.{name}": torch.cat([SIT[f"final_layer.linear.{name}"]] * 2) for name in ("weight", "bias")}


@given(another_state(SIT) | another_state(SIT | LAST), st.sampled_from(["ema", "model", "bare"]), st.booleans())
def test_a_sit_of_other_tensors_is_found_or_refused(state, where, ema):
    contents = state if where == "bare" else {where: state}
    outcome(find_sit_state, contents, "x.pt", ema=ema)


@FEW
@given(data=st.data())
def test_a_vae_of_other_tensors_is_loaded_or_refused(folder, state, data):
    torch.save(data.draw(another_state(state)), folder / "x.pt")
    for arch in ("auto", "f4d4-tiny"):
        outcome(load_vae, arch, folder / "x.pt", say=str)


def test_levels_of_any_number_are_counted(folder, state):
    renamed = {key.replace("encoder.down.1.", "encoder.down.99999999999."): value for key, value in state.items()}
    torch.save(renamed, folder / "x.pt")
    for arch, words in (("auto", "does not say its architecture"), ("f4d4-tiny", "lacks the key"), ("f8d4", "needs 8")):
        assert words in refusal(load_vae, arch, folder / "x.pt", say=str)


def test_a_container_that_holds_itself_is_left_out(folder, state):
    contents = {"vae": state}
    contents["model"] = contents
    torch.save(contents, folder / "x.pt")
    outcome(load_vae, "f4d4-tiny", folder / "x.pt", say=str)


# Configurations


CONFIG = {
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "latents_mean": [0.0] * 4,
    "_class_name": "AutoencoderKL",
}


@FEW
@given(data=st.data())
def test_a_vae_of_another_configuration_is_loaded_or_refused(folder, state, data):
    place = folder / "diffusers"
    whole = (place / "config.json").read_bytes()
    (place / "config.json").write_bytes(data.draw(broken_json(json.loads(whole))))
    outcome(vae_by_shape, "auto", place)
    vae = outcome(load_vae, "auto", place, say=str)
    (place / "config.json").write_bytes(whole)
    if vae is not None:
        outcome(latent_statistics, place, vae)


@pytest.mark.parametrize("size", [{"layers_per_block": 10**9}, {"block_out_channels": [8] * 10**5}])
def test_a_configuration_of_any_size_is_refused(folder, state, size):
    torch.save({"vae": state, "vae_config": size}, folder / "x.pt")
    assert "more than 16 levels or blocks" in refusal(load_vae, "auto", folder / "x.pt", say=str)
    place = folder / "diffusers"
    whole = (place / "config.json").read_text()
    (place / "config.json").write_text(json.dumps(json.loads(whole) | size))
    for read in (load_vae, vae_by_shape):
        assert "more than 16 levels or blocks" in refusal(read, "auto", place)
    (place / "config.json").write_text(whole)


@pytest.mark.parametrize("value", ["text", [1.0] * 4, torch.zeros(4), torch.ones(3), torch.tensor(float("nan"))])
def test_statistics_of_another_kind_are_refused(folder, value):
    vae, file = load_vae("f4d4-tiny", folder / "vae" / "vae.pt"), folder / "vae" / "vae-latents-stats.pt"
    whole = torch.load(file)
    torch.save(whole | {"latents_scale": value}, file)
    assert str(file) in refusal(latent_statistics, folder / "vae" / "vae.pt", vae)
    torch.save(whole, file)


# Files that would act, or fill the memory


READERS = {
    "checkpoint": read_torch_file,
    "vae": lambda path: load_vae("auto", path, say=str),
    "discriminator": load_discriminator,
    "encoder": read_weights,
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_that_would_write_a_file_does_not(folder, reader, old):
    contents = {"model": {"w": torch.ones(2)}, "planted": Planted(folder / "trace")}
    torch.save(contents, folder / "x.pt", _use_new_zipfile_serialization=not old)
    assert "x.pt" in refusal(READERS[reader], folder / "x.pt")
    assert not (folder / "trace").exists()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("reader", READERS)
def test_tensors_without_numbers_of_their_own_are_refused(folder, reader):
    with torch.device("meta"):
        meta = torch.zeros(10**6, 10**6)
    for tensor in (torch.zeros(1).expand(10**6, 10**6), meta, torch.zeros(2, 2).to_sparse()):
        torch.save({"decoder.conv_in.weight": tensor}, folder / "x.pt")
        assert "x.pt" in refusal(READERS[reader], folder / "x.pt")


@given(data=st.data())
def test_broken_safetensors_are_one_line(folder, data):
    if not (folder / "whole.safetensors").exists():
        from safetensors.torch import save_file

        save_file({"a": torch.ones(3), "b": torch.ones(2, 2).half()}, folder / "whole.safetensors")
    (folder / "x.safetensors").write_bytes(data.draw(broken((folder / "whole.safetensors").read_bytes())))
    outcome(read_weights, folder / "x.safetensors")
    outcome(load_vae, "auto", folder / "x.safetensors", say=str)
