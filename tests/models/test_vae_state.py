"""A VAE in files as they are found: the same network bit for bit, or one line; what is left out is said."""

import argparse
import json
import logging
import os
import shutil
import sys
from types import ModuleType

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from models.posterior import decode, encode_moments
from models.vae import build_vae, latent_statistics, load_vae, vae_config
from models.vae_architecture import public_shapes
from models.vae_files import save_vae_files, vae_of_checkpoint
from models.vae_keys import to_ldm
from models.vae_state import _problem, choose_config, find_state
from tests.support.refusals import refusal

TINY = "f4d4-tiny"


def small_vae(widths=(16, 32, 64), groups=8, **more) -> AutoencoderKL:
    """A VAE with fresh weights; its activation and the groups of its norms are what tensors do not show."""
    torch.manual_seed(0)
    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=groups,
        **more,
    ).eval()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_vae(TINY).eval()


@pytest.fixture
def said():
    return []


def same_network(one, other) -> bool:
    """Equal weights, and equal outputs: the weights alone do not show the groups of the norms."""
    torch.manual_seed(1)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        outputs = [(encode_moments(vae, pixels), decode(vae, z)) for vae in (one, other)]
    weights = other.state_dict()
    equal = all(torch.equal(tensor, weights[key]) for key, tensor in one.state_dict().items())
    return equal and all(torch.equal(mine, yours) for mine, yours in zip(*outputs, strict=True))


def copies(state):
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


# Where the tensors lie, and what they are called


def with_old_names(state):
    renamed = {}
    for key, tensor in state.items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = tensor
    assert renamed.keys() != state.keys()
    return renamed


def with_convolutions(state):
    found = {key: tensor for key, tensor in state.items() if "attentions" in key and tensor.ndim == 2}
    assert len(found) == 8
    return state | {key: tensor[:, :, None, None] for key, tensor in found.items()}


DIFFUSERS_FORMS = {
    "as they are": dict,
    "old attention names": with_old_names,
    "attention as convolutions": with_convolutions,
    "both": lambda state: with_old_names(with_convolutions(state)),
}


@pytest.mark.parametrize("arch", [TINY, "auto"])
@pytest.mark.parametrize("form", DIFFUSERS_FORMS)
def test_single_files_with_diffusers_keys(form, arch, tiny, tmp_path, said):
    state = copies(DIFFUSERS_FORMS[form](tiny.state_dict()))
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pt")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        assert same_network(load_vae(arch, path, say=said.append), tiny) and said == []


@pytest.mark.parametrize("prefix", ["first_stage_model.", "module.", "_orig_mod.", "module._orig_mod.", "vae.module."])
def test_prefixes_come_off_also_stacked(prefix, tiny, tmp_path, said):
    torch.save({prefix + key: tensor for key, tensor in to_ldm(tiny).items()}, tmp_path / "x.pt")
    assert same_network(load_vae(TINY, tmp_path / "x.pt", say=said.append), tiny) and said == []


def test_wrappers_inside_the_network_come_off(tiny, tmp_path):
    state = {key.replace("encoder.", "encoder._orig_mod."): tensor for key, tensor in to_ldm(tiny).items()}
    torch.save(state, tmp_path / "x.pt")
    assert same_network(load_vae(TINY, tmp_path / "x.pt"), tiny)


@pytest.mark.parametrize("container", ["state_dict", "model", "vae", "ema"])
def test_containers_are_opened_and_what_lies_beside_is_counted(container, tiny, tmp_path, said):
    wrapped = {f"module.{key}": tensor for key, tensor in to_ldm(tiny).items()}
    torch.save({container: wrapped, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    assert same_network(load_vae(TINY, tmp_path / "x.pt", say=said.append), tiny)
    assert said == [
        f"{tmp_path / 'x.pt'}: the VAE is what lies under {container!r}; left out: epoch (1), optimizer (1)"
    ]


def test_plain_values_among_the_tensors_are_left_out_and_counted(tiny, tmp_path, said):
    torch.save({**to_ldm(tiny), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    assert same_network(load_vae(TINY, tmp_path / "x.pt", say=said.append), tiny)
    assert said == [f"{tmp_path / 'x.pt'}: the VAE is what lies at its top; left out: epoch (1), optimizer (1)"]
    torch.save({**to_ldm(tiny), "encoder.conv_in.bias": 3}, tmp_path / "y.pt")
    assert "'encoder.conv_in.bias' is a int; a tensor is needed" in refusal(load_vae, TINY, tmp_path / "y.pt")


def test_a_key_of_shared_tuples_is_left_out_at_once(tiny):
    key = "a"
    for _ in range(19):  # as text it would have a million parts
        key = (key, key)
    said = []
    find_state({**to_ldm(tiny), key: 3}, "x.pt", said.append)
    assert said == ["x.pt: the VAE is what lies at its top; left out: tuple (1)"]


@pytest.mark.parametrize("arch", [TINY, "auto"])
def test_integers_are_no_weights(arch, tiny, tmp_path):
    torch.save({key: (50 * tensor).to(torch.int8) for key, tensor in to_ldm(tiny).items()}, tmp_path / "x.pt")
    message = refusal(load_vae, arch, tmp_path / "x.pt")
    assert "'encoder.conv_in.weight' is torch.int8; floating point is needed" in message


def test_a_decoder_that_is_no_convolution_is_one_line(tiny, tmp_path):
    torch.save(to_ldm(tiny) | {"decoder.conv_in.weight": torch.tensor(1.0)}, tmp_path / "x.pt")
    assert "'decoder.conv_in.weight' of shape (); four axes" in refusal(load_vae, TINY, tmp_path / "x.pt")
    refusal(load_vae, "auto", tmp_path / "x.pt")


def test_another_pickle_protocol_gives_the_same_network(tiny, tmp_path, said):
    torch.save(to_ldm(tiny), tmp_path / "x.pt", pickle_protocol=4)
    assert same_network(load_vae(TINY, tmp_path / "x.pt", say=said.append), tiny) and said == []


def test_a_tensor_whose_signs_are_still_to_be_turned_keeps_them_or_is_missed(tiny, tmp_path, lightning):
    state = to_ldm(tiny)
    turned = state | {"encoder.conv_in.weight": (-state["encoder.conv_in.weight"])._neg_view()}
    torch.save(turned, tmp_path / "x.pt")
    vae = load_vae(TINY, tmp_path / "x.pt")
    assert same_network(vae, tiny) and not vae.encoder.conv_in.weight.is_neg()
    torch.save(lightning | {"state_dict": turned}, tmp_path / "y.ckpt")
    message = refusal(load_vae, TINY, tmp_path / "y.ckpt")
    assert "lacks the key 'encoder.conv_in.weight'" in message


def test_a_whole_stable_diffusion_checkpoint(tiny, tmp_path, said):
    first_stage = {f"first_stage_model.{key}": tensor for key, tensor in to_ldm(tiny).items()}
    rest = {f"model.diffusion_model.{i}": torch.zeros(1) for i in range(3)} | {"betas": torch.zeros(4)}
    loss = {"first_stage_model.loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": first_stage | rest | loss, "global_step": 5}, tmp_path / "sd.ckpt")
    assert same_network(load_vae(TINY, tmp_path / "sd.ckpt", say=said.append), tiny)
    assert len(said) == 2 and "'state_dict.first_stage_model'; left out: state_dict (4), global_step (1)" in said[0]
    assert "1 keys under 'loss.' are not the VAE's and were dropped" in said[1]


def test_of_two_vaes_the_average_is_taken_and_said(tiny, tmp_path, said):
    other = {key: tensor + 1 for key, tensor in to_ldm(tiny).items()}
    torch.save({"model": other, "ema": to_ldm(tiny)}, tmp_path / "x.pt")
    assert same_network(load_vae(TINY, tmp_path / "x.pt", say=said.append), tiny)
    assert "holds 2 VAEs, under 'ema', 'model': that under 'ema' is taken" in said[0]
    assert "left out: model (" in said[1]
    torch.save({"model": {"a": torch.zeros(1)}, "ema": to_ldm(tiny)}, tmp_path / "y.pt")
    assert same_network(load_vae(TINY, tmp_path / "y.pt", say=said.append), tiny)
    assert "left out: model (1)" in said[2] and len(said) == 3


@pytest.fixture
def lightning(monkeypatch):
    """A checkpoint's entries as Lightning has them, of classes that are gone when it is read."""
    module = ModuleType("lightning_like")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "lightning_like"})
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    yield {"callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint()}}, "epoch": 3}


class WouldWrite:
    """Pickles as the writing of a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_lightning_checkpoints_load_and_nothing_of_theirs_runs(tiny, tmp_path, said, lightning):
    contents = lightning | {"state_dict": to_ldm(tiny), "hyper_parameters": WouldWrite(tmp_path / "trace")}
    torch.save(contents, tmp_path / "x.ckpt")
    del sys.modules["lightning_like"]
    assert same_network(load_vae(TINY, tmp_path / "x.ckpt", say=said.append), tiny)
    assert not (tmp_path / "trace").exists()
    assert f"{tmp_path / 'x.ckpt'}: 2 objects of foreign classes were left out unread (" in said[0]
    assert "1 of lightning_like.ModelCheckpoint" in said[0] and "1 of posix.system" in said[0]

    # In torch's form before 1.6 the tensors cannot be read apart, and the class is named.
    torch.save({**to_ldm(tiny), "x": WouldWrite(1)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "holds an object of posix.system" in refusal(load_vae, TINY, tmp_path / "old.ckpt")


def test_what_is_left_out_is_logged_where_nobody_takes_it(tiny, tmp_path, caplog):
    torch.save({"model": to_ldm(tiny), "epoch": 3}, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING):
        load_vae(TINY, tmp_path / "x.pt")
    assert "the VAE is what lies under 'model'; left out: epoch (1)" in caplog.text


# The VAE inside a training checkpoint


@pytest.mark.parametrize("jointly", [False, True])
def test_a_training_checkpoint_is_a_vae_file_of_its_own_architecture(jointly, tmp_path):
    vae = small_vae((16, 32, 48), 16, act_fn="relu")
    contents = {"vae": to_ldm(vae), "vae_config": vae_config(vae), "args": {"vae": "auto"}, "steps": 3, "format": 1}
    sit = {"bn.running_mean": torch.zeros(4)}
    contents |= {"model": sit, "ema": sit} if jointly else {"opt_vae": {}, "discriminator": {}}
    torch.save(contents, tmp_path / "0000003.pt")
    assert same_network(load_vae("auto", tmp_path / "0000003.pt"), vae)
    assert same_network(vae_of_checkpoint(contents, "x.pt"), vae)


@pytest.mark.parametrize("args", [{"vae": TINY}, argparse.Namespace(vae=TINY), argparse.Namespace(vae="auto"), {}])
def test_public_checkpoints_have_the_architecture_of_their_args_or_a_shape_that_fits(args, tiny, tmp_path):
    torch.save({"vae": to_ldm(tiny), "model": {}, "ema": {}, "args": args}, tmp_path / "public.pt")
    assert same_network(load_vae("auto", tmp_path / "public.pt"), tiny)


# The architecture


@pytest.mark.parametrize(
    "options",
    [
        dict(widths=(16, 32, 64), groups=16),
        dict(widths=(16, 32, 48), groups=8),
        dict(widths=(16, 32, 48), groups=16, act_fn="gelu"),
        dict(widths=(32, 32, 64), groups=32, layers_per_block=2, mid_block_add_attention=False),
        dict(widths=(16, 16, 32), groups=4, use_quant_conv=False, use_post_quant_conv=False),
    ],
)
def test_what_we_write_reads_back_as_the_same_network(options, tmp_path):
    vae = small_vae(**options)
    folder = save_vae_files(tmp_path, "v", vae, torch.full((4,), 2.0), torch.ones(4))
    weights = folder / "diffusers" / "diffusion_pytorch_model.safetensors"
    for path in (folder / "v.pt", folder / "diffusers", weights):
        again = load_vae("auto", path)
        assert same_network(again, vae), path
        scale, bias = latent_statistics(path, again)
        assert (scale == 2).all() and (bias == 1).all(), path


def test_where_nothing_says_the_architecture_it_is_refused(tmp_path):
    for name, vae in {"wide": small_vae((16, 32, 48), 16), "none": small_vae((32, 64), 32)}.items():
        torch.save(to_ldm(vae), tmp_path / f"{name}.pt")
        message = refusal(load_vae, "auto", tmp_path / f"{name}.pt")
        assert (
            message.startswith(f"--vae-ckpt: {tmp_path / name}.pt does not say its architecture")
            and "\n" not in message
        )
        assert "--vae auto needs its diffusers folder, or that folder's config.json in diffusers/" in message


def test_a_preset_that_is_another_network_is_refused(tmp_path):
    folder = save_vae_files(tmp_path, "v", small_vae(groups=16, layers_per_block=1), torch.ones(4), torch.zeros(4))
    message = refusal(load_vae, TINY, folder / "v.pt")
    assert "has norm_num_groups 16; --vae f4d4-tiny has 8: 'auto' takes the file's" in message


def test_a_short_configuration_is_completed_by_the_defaults_of_diffusers(tiny, tmp_path):
    folder = save_vae_files(tmp_path, "v", small_vae((16, 32, 48), 16), torch.ones(4), torch.zeros(4))
    config = json.loads((folder / "diffusers" / "config.json").read_text())
    short = {key: value for key, value in config.items() if key != "latent_channels"}  # 4, as the default
    (folder / "diffusers" / "config.json").write_text(json.dumps(short))
    assert load_vae("auto", folder / "v.pt").config.latent_channels == 4

    # What does not fit then is one line.
    torch.save({"vae": to_ldm(tiny), "vae_config": {"norm_num_groups": 8}}, tmp_path / "x.pt")
    assert "x.pt downsamples by 4; --vae auto needs 1" in refusal(load_vae, "auto", tmp_path / "x.pt")


def test_a_configuration_of_another_network_beside_the_file_is_not_used(tiny, tmp_path, said):
    folder = save_vae_files(tmp_path, "v", small_vae((16, 32, 48), 16), torch.ones(4), torch.zeros(4))
    torch.save(to_ldm(tiny), folder / "other.pt")
    assert same_network(load_vae("auto", folder / "other.pt", say=said.append), tiny)
    assert len(said) == 1 and "diffusers/config.json was not used: it describes another network" in said[0]
    config = json.loads((folder / "diffusers" / "config.json").read_text())
    (folder / "diffusers" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 7}))
    assert "does not say its architecture" in refusal(load_vae, "auto", folder / "v.pt")


def test_statistics_in_a_configuration_are_those_of_the_weights_beside_it_alone(tiny, tmp_path):
    """Other weights of the same shape put beside the diffusers folder do not get its statistics."""
    folder = save_vae_files(tmp_path, "v", tiny, torch.full((4,), 2.0), torch.ones(4))
    torch.save({key: tensor + 1 for key, tensor in to_ldm(tiny).items()}, folder / "other.pt")
    vae = load_vae("auto", folder / "other.pt")
    assert vae.config.norm_num_groups == 8 and latent_statistics(folder / "other.pt", vae) is None

    # Nor do such as lie in the diffusers folder itself.
    shutil.copy(folder / "other.pt", folder / "diffusers" / "other.pt")
    vae = load_vae("auto", folder / "diffusers" / "other.pt")
    assert latent_statistics(folder / "diffusers" / "other.pt", vae) is None


@pytest.mark.parametrize("arch", [TINY, "auto"])
def test_the_weights_of_diffusers_have_the_statistics_of_their_own_configuration(arch, tiny, tmp_path):
    """With a named architecture too, and where another diffusers folder lies inside."""
    inner = save_vae_files(tmp_path, "v", tiny, torch.full((4,), 4.0), torch.zeros(4)) / "diffusers"
    outer = save_vae_files(tmp_path, "w", tiny, torch.full((4,), 2.0), torch.ones(4)) / "diffusers"
    shutil.move(inner, outer / "diffusers")
    weights = outer / "diffusion_pytorch_model.safetensors"
    scale, bias = latent_statistics(weights, load_vae(arch, weights))
    assert (scale == 2).all() and (bias == 1).all()


@pytest.mark.parametrize("name", public_shapes)
def test_public_shapes_are_found_by_what_they_hold(name):
    with torch.device("meta"):
        vae = build_vae(name)
    for state in (to_ldm(vae), vae.state_dict()):
        config = choose_config(state, "auto", None, "x.pt", "--vae auto")
        assert config is public_shapes[name] and _problem(state, vae) is None


def test_only_rgb_is_taken(tmp_path):
    vae = small_vae(in_channels=1, out_channels=1)
    folder = save_vae_files(tmp_path, "grey", vae, torch.ones(4), torch.zeros(4))
    for path in (folder / "grey.pt", folder / "diffusers"):
        assert "takes images of 1 and gives some of 1 channels; RGB is needed" in refusal(load_vae, "auto", path)


def test_a_copy_without_its_folder_does_not_become_another_network(tmp_path):
    folder = save_vae_files(tmp_path, "v", small_vae((32, 64), 8), torch.ones(4), torch.zeros(4))
    shutil.copy(folder / "v.pt", tmp_path / "lonely.pt")
    assert "does not say its architecture" in refusal(load_vae, "auto", tmp_path / "lonely.pt")
