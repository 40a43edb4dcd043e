"""save_vae_weights.py: the files of a tuned VAE, from our checkpoints and from public ones."""

import argparse

import pytest
import torch
from diffusers import AutoencoderKL

import save_vae_weights
from models.discriminator import PatchDiscriminator
from models.vae import build_vae, latent_statistics, load_vae, vae_config
from models.vae_keys import to_ldm
from tests.support import small
from tests.support.golden_data import close, load

ARRAYS, _ = load("traj_repae_f8d4_lowlr")  # its normaliser has 4 channels, as the tiny VAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("f4d4-tiny")


@pytest.fixture(scope="module")
def discriminator():
    return PatchDiscriminator().state_dict()


@pytest.fixture
def checkpoint(vae, discriminator):
    """The entries of a REPA-E checkpoint that the script reads, as the public code writes them."""

    def normaliser(network):
        names = ("running_mean", "running_var", "num_batches_tracked")
        return {f"bn.{name}": torch.from_numpy(ARRAYS[f"final.{network}.bn.{name}"]) for name in names}

    return {
        "model": normaliser("sit"),
        "ema": normaliser("ema"),
        "vae": to_ldm(vae),
        "discriminator": discriminator,
        "opt": {},
        "args": argparse.Namespace(vae="f4d4-tiny", vae_ckpt="x.pt"),
        "steps": 3,
    }


def save(tmp_path, contents, *flags):
    torch.save(contents, tmp_path / "0000003.pt")
    usual = small.argv(repae_ckpt=tmp_path / "0000003.pt", vae_name="e2e", save_dir=tmp_path / "exps")
    save_vae_weights.main([*usual, *flags])
    return tmp_path / "exps" / "e2e"


def refused(capsys, tmp_path, contents, *flags):
    with pytest.raises(SystemExit) as leaving:
        save(tmp_path, contents, *flags)
    message = capsys.readouterr().err
    assert leaving.value.code == 2 and message.count("\n") == 1
    return message


def public(checkpoint, vae):
    return checkpoint


def ours(checkpoint, vae):
    return checkpoint | {"args": {"vae": "auto"}, "vae_config": vae_config(vae), "format": 1}


def without_architecture(checkpoint, vae):
    return checkpoint | {"args": argparse.Namespace(model="SiT-XL/2")}


@pytest.mark.parametrize("form", [public, ours, without_architecture])
def test_the_files_hold_the_checkpoints_vae_and_statistics(form, checkpoint, vae, discriminator, tmp_path):
    folder = save(tmp_path, form(checkpoint, vae))
    expected = {"e2e.pt", "e2e-latents-stats.pt", "e2e-discriminator-ckpt.pt", "diffusers"}
    assert {path.name for path in folder.iterdir()} == expected

    state = torch.load(folder / "e2e.pt")
    assert list(state) == list(to_ldm(vae))
    assert all(torch.equal(state[key], tensor) for key, tensor in to_ldm(vae).items())
    stats = torch.load(folder / "e2e-latents-stats.pt")
    assert list(stats) == ["latents_scale", "latents_bias"]
    for name, tensor in stats.items():  # what the public script exported from this trajectory
        close(tensor, ARRAYS[f"extracted.{name}"], 1e-6)
    saved_discriminator = torch.load(folder / "e2e-discriminator-ckpt.pt")
    assert all(torch.equal(saved_discriminator[key], tensor) for key, tensor in discriminator.items())

    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1, "files readable by some and not by others"
    plain = AutoencoderKL.from_pretrained(folder / "diffusers")
    assert all(torch.equal(tensor, vae.state_dict()[key]) for key, tensor in plain.state_dict().items())
    assert plain.config.latents_mean == stats["latents_bias"].flatten().tolist()
    assert plain.config.norm_num_groups == 8
    for path in (folder / "e2e.pt", folder / "diffusers"):  # training finds the same statistics in either
        scale, bias = latent_statistics(path, load_vae("auto", path))
        assert torch.equal(scale, stats["latents_scale"]) and torch.equal(bias, stats["latents_bias"])


def test_without_a_discriminator_its_file_is_left_out(checkpoint, tmp_path):
    folder = save(tmp_path, {key: value for key, value in checkpoint.items() if key != "discriminator"})
    assert {path.name for path in folder.iterdir()} == {"e2e.pt", "e2e-latents-stats.pt", "diffusers"}


def test_overwrite_replaces_the_vaes_files_and_nothing_else(checkpoint, vae, capsys, tmp_path):
    folder = save(tmp_path, checkpoint)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "e2e.pt").read_bytes()
    message = refused(capsys, tmp_path, checkpoint)
    assert "--vae-name" in message and "e2e.pt exists already" in message and "--overwrite" in message
    assert (folder / "e2e.pt").read_bytes() == before

    changed = {key: tensor + 1 for key, tensor in to_ldm(vae).items()}
    rest = {key: value for key, value in checkpoint.items() if key != "discriminator"}
    save(tmp_path, rest | {"vae": changed}, "--overwrite")
    assert {path.name for path in folder.iterdir()} == {"e2e.pt", "e2e-latents-stats.pt", "diffusers", "notes.txt"}
    for path in (folder / "e2e.pt", folder / "diffusers"):
        assert torch.equal(to_ldm(load_vae("auto", path))["quant_conv.bias"], changed["quant_conv.bias"])


def test_bad_checkpoints_are_one_line(checkpoint, vae, capsys, tmp_path):
    ldm_only = {key: checkpoint[key] for key in ("model", "ema", "opt", "args", "steps")}
    assert "holds no VAE: it is a checkpoint of train_ldm_only.py" in refused(capsys, tmp_path, ldm_only)
    assert "lacks the entry 'ema'" in refused(capsys, tmp_path, {"vae": to_ldm(vae), "model": {}})
    assert "vae has 4 latent channels; --vae f16d32 needs 32" in refused(
        capsys, tmp_path, checkpoint, "--vae", "f16d32"
    )
    wide = {"bn.running_mean": torch.zeros(32), "bn.running_var": torch.ones(32)}
    assert "ema normalises 32 channels; its VAE has 4" in refused(capsys, tmp_path, checkpoint | {"ema": wide})
    assert "ema lacks the key 'bn.running_mean'" in refused(capsys, tmp_path, checkpoint | {"ema": {}})
    cut = {key: tensor for key, tensor in to_ldm(vae).items() if key != "encoder.conv_in.bias"}
    assert "vae lacks the key 'encoder.conv_in.bias'" in refused(capsys, tmp_path, checkpoint | {"vae": cut})
    assert "a name without folders" in refused(capsys, tmp_path, checkpoint, "--vae-name", "a/b")
    assert not (tmp_path / "exps").exists()


def test_missing_and_damaged_checkpoints_are_one_line(checkpoint, capsys, tmp_path):
    for contents in (None, b"", b"<html>", b"PK\x03\x04cut"):
        path = tmp_path / "damaged.pt"
        path.unlink(missing_ok=True)
        if contents is not None:
            path.write_bytes(contents)
        with pytest.raises(SystemExit) as leaving:
            save_vae_weights.main(["--repae-ckpt", str(path)])
        message = capsys.readouterr().err
        assert leaving.value.code == 2 and message.count("\n") == 1 and f"--repae-ckpt: {path}" in message
