"""The scripts with VAEs as they are found: other kinds, training checkpoints, and none at all."""

import json
import shutil

import numpy as np
import pytest
import torch

import cache_latents
import evaluate
import generate
import save_vae_weights
import train_ldm_only
import train_repae
import train_vae
from dataset.data import ImageData
from models.posterior import measure_latent_statistics
from models.vae import build_vae, latent_statistics, load_vae, vae_config
from models.vae_files import save_vae_files
from models.vae_keys import to_ldm
from sampling.trained import load_trained
from tests.support import small

KINDS = {
    "qwen": ("AutoencoderKLQwenImage", small.write_qwen, 4),
    "flux2": ("AutoencoderKLFlux2", small.write_flux2, 16),
}


def refused(capsys, main, argv) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    message = capsys.readouterr().err.splitlines()[-1]
    assert leaving.value.code == 2 and "error: " in message
    return message


def same_weights(one, other) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# Other kinds than AutoencoderKL


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_vae_of_another_kind_serves_from_cache_to_sample(kind, place, tmp_path, few_steps):
    name, write, channels = KINDS[kind]
    folder, data = write(tmp_path / "vae"), shutil.copytree(place.data, tmp_path / "data")
    cache = dict(vae_arch="auto", vae_ckpt_path=folder, data_dir=data, output_dir=data)
    cache_latents.main(small.cache_options(place, f"{kind}-latents", **cache))
    description = json.loads((data / f"{kind}-latents.json").read_text())
    assert description["shape"] == [small.COUNT, 2 * channels, 6, 6]
    assert description["vae_config"]["_class_name"] == name
    scale, bias = latent_statistics(folder, load_vae("auto", folder))  # those that the VAE itself carries
    assert torch.equal(torch.tensor(description["latents_scale"]), scale.flatten())

    options = dict(vae="auto", vae_ckpt=folder, data_dir=data, vae_latents_name=f"{kind}-latents")
    options |= dict(num_preview=2, sampling_steps=4)
    train_ldm_only.main(small.ldm_options(place, tmp_path, "run", **options))
    model = small.checkpoint(tmp_path, "run", 4)["model"]
    assert torch.allclose(model["bn.running_var"].rsqrt(), scale.flatten())
    assert torch.equal(model["bn.running_mean"], bias.flatten())
    usual = dict(exp_path=tmp_path / "run", sample_dir=tmp_path / "samples", num_fid_samples=4, num_steps=2)
    generate.main(small.argv(**usual))
    (file,) = (tmp_path / "samples").glob("*.npz")
    images = np.load(file)["arr_0"]
    assert images.shape == (4, small.RESOLUTION, small.RESOLUTION, 3) and images.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_vae_of_another_kind_is_refused_by_its_name(kind, place, tmp_path, capsys):
    name, write, _ = KINDS[kind]
    options = dict(vae="auto", vae_ckpt=write(tmp_path / "vae"))
    for main, argv in ((train_repae.main, small.repae_options), (train_vae.main, small.vae_options)):
        message = refused(capsys, main, argv(place, tmp_path / "exps", "run", **options))
        assert f"--vae-ckpt: an {name} cannot be trained here" in message
    assert not (tmp_path / "exps").exists()


# No weights at all


def test_repae_starts_from_fresh_weights_with_measured_statistics(place, tmp_path):
    options = dict(vae_ckpt="none", disc_pretrained_ckpt=None, max_train_steps=1, checkpointing_steps=1)
    train_repae.main(small.repae_options(place, tmp_path, "run", **options, vae_learning_rate=0, learning_rate=0))
    found = small.checkpoint(tmp_path, "run", 1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "--vae-ckpt none: the VAE (f4d4-tiny) starts from fresh weights" in log and "measured on the data set" in log

    given = torch.load(place.vae, weights_only=True)
    assert not same_weights(found["vae"], given)
    fresh = build_vae(small.TINY_VAE)
    assert found["vae"].keys() == to_ldm(fresh).keys()
    stats = torch.load(tmp_path / "run" / "latents-stats.pt", weights_only=True)
    vae = load_vae(small.TINY_VAE, tmp_path / "run" / "checkpoints" / "0000001.pt")
    scale, bias = measure_latent_statistics(vae, ImageData(place.data), device="cpu")
    assert torch.allclose(stats["latents_scale"], scale) and torch.allclose(stats["latents_bias"], bias, atol=1e-6)


def test_fresh_weights_are_those_of_the_seed_and_can_be_resumed(place, tmp_path):
    options = dict(vae_ckpt="none", disc_pretrained_ckpt=None)
    train_repae.main(small.repae_options(place, tmp_path, "whole", **options))
    train_repae.main(small.repae_options(place, tmp_path, "parts", **options, max_train_steps=2))
    train_repae.main(small.repae_options(place, tmp_path, "parts", **options, resume="latest"))
    whole, parts = (small.checkpoint(tmp_path, name, 4) for name in ("whole", "parts"))
    small.assert_same(parts["vae"], whole["vae"])


def test_none_is_refused_where_weights_are_needed(place, exps, tmp_path, capsys):
    none = dict(vae_ckpt="none")
    auto = small.repae_options(place, tmp_path / "exps", "run", **none, vae="auto")
    assert "--vae: auto was given; with --vae-ckpt none it must name an architecture" in refused(
        capsys, train_repae.main, auto
    )
    sampling = small.argv(exp_path=exps / "ldm", sample_dir=tmp_path / "exps", **none)
    for main, argv, flag in (
        (train_ldm_only.main, small.ldm_options(place, tmp_path / "exps", "run", **none), "--vae-ckpt"),
        (train_vae.main, small.vae_options(place, tmp_path / "exps", "run", **none), "--vae-ckpt"),
        (cache_latents.main, small.cache_options(place, "x", vae_ckpt_path="none"), "--vae-ckpt-path"),
        (evaluate.main, small.argv(reconstruct=True, vae_ckpt="none", data_dir=place.data, lpips=False), "--vae-ckpt"),
        (generate.main, sampling, "--vae-ckpt"),
    ):
        assert f"{flag}: none was given; the weights of a VAE are needed" in refused(capsys, main, argv), argv
    assert not (tmp_path / "exps").exists()


# The VAE inside a training checkpoint


@pytest.fixture(scope="module")
def checkpoints(place, tmp_path_factory):
    """{script: a checkpoint of a short run of it}."""
    output, options = tmp_path_factory.mktemp("runs"), dict(max_train_steps=1, checkpointing_steps=1)
    train_vae.main(small.vae_options(place, output, "vae", **options))
    train_repae.main(small.repae_options(place, output, "repae", **options))
    return {name: output / name / "checkpoints" / "0000001.pt" for name in ("vae", "repae")}


@pytest.mark.parametrize("run", ["vae", "repae"])
def test_the_vae_of_a_checkpoint_is_evaluated_as_the_one_taken_out(run, checkpoints, place, tmp_path):
    save_vae_weights.main(small.argv(repae_ckpt=checkpoints[run], vae_name="out", save_dir=tmp_path))
    numbers = {}
    for path in (checkpoints[run], tmp_path / "out" / "out.pt"):
        usual = dict(reconstruct=True, vae_ckpt=path, data_dir=place.data, lpips=False, features="none", num_picture=0)
        evaluate.main(small.argv(**usual, output=tmp_path / "numbers.json"))
        numbers[path.name] = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["0000001.pt"]["psnr"] == numbers["out.pt"]["psnr"]
    assert numbers["out.pt"]["remarks"] == []
    (note,) = numbers["0000001.pt"]["remarks"]
    assert "0000001.pt: the VAE is what lies under 'vae'; left out: " in note


def test_a_checkpoint_of_train_vae_gives_its_vae_without_statistics_and_says_so(checkpoints, tmp_path, capsys):
    usual = small.argv(repae_ckpt=checkpoints["vae"], vae_name="out", save_dir=tmp_path)
    save_vae_weights.main(usual)
    assert "holds no latent statistics: none were written" in capsys.readouterr().out
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"out.pt", "out-discriminator-ckpt.pt", "diffusers"}
    inside = torch.load(checkpoints["vae"], weights_only=True)["vae"]
    for path in (folder / "out.pt", folder / "diffusers"):
        vae = load_vae("auto", path)
        assert same_weights(to_ldm(vae), inside) and latent_statistics(path, vae) is None

    # Nor do those of the VAE that is replaced stay.
    torch.save({"latents_scale": torch.ones(4), "latents_bias": torch.ones(4)}, folder / "out-latents-stats.pt")
    save_vae_weights.main([*usual, "--overwrite"])
    assert not (folder / "out-latents-stats.pt").exists()


# A VAE that a checkpoint names


def test_a_run_whose_vae_lies_without_its_architecture_is_refused(exps, tmp_path, capsys):
    torch.manual_seed(0)
    vae = build_vae(vae_config(build_vae(small.TINY_VAE)) | {"block_out_channels": [16, 32, 48]})
    folder = save_vae_files(tmp_path, "v", vae, torch.ones(4), torch.zeros(4))
    contents = torch.load(exps / "ldm" / "checkpoints" / "0000007.pt", weights_only=True)
    contents["args"] |= {"vae": "auto", "vae_ckpt": str(folder / "v.pt")}
    path = tmp_path / "run" / "checkpoints" / "0000007.pt"
    path.parent.mkdir(parents=True)
    torch.save(contents, path)
    found = load_trained(tmp_path / "run").vae
    assert same_weights(found.state_dict(), vae.state_dict()) and found.config.norm_num_groups == 8

    shutil.rmtree(folder / "diffusers")
    sampling = small.argv(exp_path=tmp_path / "run", sample_dir=tmp_path / "samples")
    assert f"{folder / 'v.pt'} does not say its architecture" in refused(capsys, generate.main, sampling)


@pytest.mark.parametrize("script", ["train_vae", "train_repae"])
@pytest.mark.parametrize("groups", [8, 16])
def test_what_training_writes_reads_back_as_the_same_network(script, groups, place, tmp_path):
    """Of a VAE in no public shape; its groups are in no tensor."""
    odd = {"block_out_channels": [16, 32, 48], "norm_num_groups": groups}
    torch.manual_seed(0)
    build_vae(vae_config(build_vae(small.TINY_VAE)) | odd).save_pretrained(tmp_path / "start")
    options = dict(vae="auto", vae_ckpt=tmp_path / "start", max_train_steps=1, checkpointing_steps=1)
    if script == "train_vae":
        train_vae.main(small.vae_options(place, tmp_path, "run", **options))
        written = [tmp_path / "run" / "run.pt", tmp_path / "run" / "diffusers"]
    else:
        train_repae.main(small.repae_options(place, tmp_path, "run", **options))
        checkpoint = tmp_path / "run" / "checkpoints" / "0000001.pt"
        save_vae_weights.main(small.argv(repae_ckpt=checkpoint, vae_name="out", save_dir=tmp_path))
        written = [checkpoint, tmp_path / "out" / "out.pt", tmp_path / "out" / "diffusers"]
    trained = small.checkpoint(tmp_path, "run", 1)["vae"]
    for path in written:
        vae = load_vae("auto", path)
        assert vae.config.norm_num_groups == groups and same_weights(to_ldm(vae), trained), path
