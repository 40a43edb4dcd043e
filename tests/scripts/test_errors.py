"""What bad input gets: one line on stderr that says what is needed, exit code 2, and nothing written."""

import contextlib
import shutil
from collections import namedtuple
from datetime import date
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import cache_latents
import generate
import preprocessing
import save_vae_weights
import train_ldm_only
import train_repae
import train_vae
from tests.support import small

MAIN = {
    module.__name__: module.main
    for module in (train_repae, train_ldm_only, train_vae, cache_latents, save_vae_weights, generate, preprocessing)
}


@pytest.fixture(scope="module")
def bad(place, tmp_path_factory):
    """A folder of things that cannot be used. `exps/run` is a REPA-E run of one step; the other runs are variants of
    its checkpoint; `exps/ldm` is an LDM-only run of one step without label dropping."""
    folder = tmp_path_factory.mktemp("bad")
    train_repae.main(small.repae_options(place, folder / "exps", "run", max_train_steps=1))
    train_ldm_only.main(small.ldm_options(place, folder / "exps", "ldm", max_train_steps=1, cfg_prob=0))
    write_data_folders(folder)
    write_checkpoints(folder / "exps", small.checkpoint(folder / "exps", "run", 1))
    (folder / "truncated.pt").write_bytes(place.vae.read_bytes()[:100_000])
    (folder / "page.pt").write_text("<html>404</html>")
    torch.save({"weight": torch.zeros(1)}, folder / "other.pt")
    torch.save({"weight": torch.zeros(1), "trained": date(2025, 4, 14)}, folder / "foreign.pt")
    (folder / "unknown_key.yaml").write_text("perceptual_wait: 0\n")
    small.write_loss_config(folder / "lpips.yaml", perceptual_weight=1)
    (folder / "exps" / "mine").mkdir()
    (folder / "exps" / "mine" / "thesis.txt").write_text("no run")
    (folder / "exps" / "file").write_text("no folder")
    small.write_vae(folder / "exps", "finished")
    return folder


def write_data_folders(folder):
    (folder / "public").mkdir()
    (folder / "public" / "images.h5").touch()
    for size in (16, 26, 32):
        small.write_data(folder / f"data{size}", resolution=size)
    damaged = small.write_data(folder / "damaged")
    (damaged / "images.npy").write_bytes((damaged / "images.npy").read_bytes()[:-100])


def write_checkpoints(exps, good):
    """Each variant of a whole checkpoint lacks or has just one thing; `opt*` are kept only where they matter."""
    optimizers = ("opt", "opt_vae", "opt_disc")
    light = {key: {"state": {}} if key in optimizers else value for key, value in good.items()}
    without = {
        key: {k: v for k, v in good[key].items() if k != lost}
        for key, lost in (("model", "blocks.1.attn.qkv.bias"), ("vae", "quant_conv.bias"))
    }
    moments = {k: v for k, v in good["opt"]["state"].items() if k != 3}
    variants = {
        "no-ema": {"model": {}, "steps": 1},
        "no-bias": light | {"model": without["model"]},
        "no-vae-bias": light | {"vae": without["vae"]},
        "no-moments": light | {"opt": good["opt"] | {"state": moments}},
        "no-optimizer": light | {"opt": {}},
        "new-format": {key: {} for key in good} | {"format": 99},
        "foreign": {"model": {}, "ema": {}, "when": date(2025, 4, 14)},
    }
    for name, contents in variants.items():
        (exps / name / "checkpoints").mkdir(parents=True)
        torch.save(contents, exps / name / "checkpoints" / "0000001.pt")
    shutil.copytree(exps / "no-ema", exps / "truncated")
    whole = (exps / "ldm" / "checkpoints" / "0000001.pt").read_bytes()
    (exps / "truncated" / "checkpoints" / "0000001.pt").write_bytes(whole[: len(whole) // 2])


LPIPS = dict(loss_cfg_path="{bad}/lpips.yaml")
DINOV2 = dict(enc_type="dinov2-vit-b", data_dir="{bad}/data32", resolution=32)
NO_WEIGHTS = "--enc-type: dinov2-vit-b has no weights here"
# script, changed options ({bad} and {place} are folders), what the one line must hold
CASES = [
    # data
    ("train_repae", dict(data_dir="{bad}/none"), "--data-dir: {bad}/none", "python preprocessing.py --imagenet-path"),
    ("train_repae", dict(data_dir="{bad}/public"), "--data-dir", "images.h5", "Run preprocessing.py again"),
    ("train_repae", dict(data_dir="{bad}/data32"), "--resolution: 24 was given", "32 x 32", "preprocessing.py"),
    ("train_repae", dict(data_dir="{bad}/damaged"), "{bad}/damaged/images.npy: damaged"),
    ("train_repae", dict(data_dir="{bad}/data26", resolution=26), "--resolution: 26 was given; a multiple of 4"),
    ("train_repae", dict(data_dir="{bad}/data16", resolution=16), "--resolution: 16 was given", "needs 24"),
    ("train_repae", dict(num_classes=3), "--num-classes: 3 was given", "largest label", "at least 4"),
    ("train_repae", dict(batch_size=21), "--batch-size: 21 was given", "20 images, less than one batch"),
    ("train_ldm_only", dict(data_dir="{bad}/none"), "--data-dir", "preprocessing.py"),
    ("train_ldm_only", dict(vae_latents_name="none"), "--vae-latents-name", "none.npy", "cache_latents.py"),
    ("train_ldm_only", dict(batch_size=21), "--batch-size: 21 was given", "less than one batch"),
    ("train_vae", dict(data_dir="{bad}/none"), "--data-dir", "preprocessing.py"),
    ("train_vae", dict(data_dir="{bad}/data16", resolution=16), "--resolution: 16 was given", "needs 24"),
    ("preprocessing", dict(imagenet_path="{bad}/none", output_path="{bad}/new"), "--imagenet-path", "{bad}/none"),
    # VAE and discriminator
    ("train_repae", dict(vae_ckpt="{bad}/none.pt"), "--vae-ckpt: {bad}/none.pt does not exist", "hf download"),
    ("train_repae", dict(vae_ckpt="{bad}/truncated.pt"), "--vae-ckpt: {bad}/truncated.pt", "truncated"),
    ("train_repae", dict(vae_ckpt="{bad}/other.pt"), "--vae-ckpt", "not the state dict of a VAE", "decoder.conv_in"),
    ("train_repae", dict(vae_ckpt="{bad}/foreign.pt"), "--vae-ckpt", "datetime.date"),
    ("train_repae", dict(vae="f16d32"), "--vae-ckpt", "has 4 latent channels; --vae f16d32 needs 32"),
    ("train_repae", dict(vae="f8d4"), "--vae-ckpt", "downsamples by 4; --vae f8d4 needs 8"),
    ("train_repae", dict(disc_pretrained_ckpt="{bad}/none.pt"), "--disc-pretrained-ckpt", "not exist", "hf download"),
    ("train_repae", dict(disc_pretrained_ckpt="{bad}/page.pt"), "--disc-pretrained-ckpt", "page.pt", "checkpoint"),
    ("train_repae", dict(disc_pretrained_ckpt="{bad}/other.pt"), "--disc-pretrained-ckpt", "lacks main.0.weight"),
    ("train_vae", dict(vae="auto"), "--vae auto", "--vae-ckpt"),
    ("train_ldm_only", dict(vae_ckpt="{bad}/none.pt"), "--vae-ckpt: {bad}/none.pt does not exist", "hf download"),
    ("train_ldm_only", dict(vae_ckpt="{bad}/exps/finished/finished.pt"), "--vae-ckpt", "is not the VAE", "cached with"),
    ("cache_latents", dict(vae_ckpt_path="{bad}/none.pt"), "--vae-ckpt-path: {bad}/none.pt", "hf download"),
    ("save_vae_weights", dict(repae_ckpt="{bad}/none.pt"), "--repae-ckpt: {bad}/none.pt does not", "hf download"),
    ("save_vae_weights", dict(repae_ckpt="{bad}/exps/ldm/checkpoints/0000001.pt"), "--repae-ckpt", "holds no VAE"),
    # SiT
    ("train_repae", dict(model="SiT-T/4"), "--model: SiT-T/4 was given", "patch does not divide", "6 x 6"),
    ("train_repae", dict(model="SiT-H/2"), "--model", "'SiT-H/2'", "SiT-XL/2"),
    ("train_repae", dict(encoder_depth=7), "--encoder-depth: 7 was given; SiT-T/2 has blocks 1..6"),
    ("train_repae", dict(encoder_depth=0), "--encoder-depth", "'0'", ">= 1"),
    ("train_repae", dict(path_type="sigmoid"), "--path-type", "'sigmoid'", "linear", "cosine"),
    ("train_repae", dict(vae="f32d64"), "--vae", "'f32d64'", "f16d32"),
    ("train_repae", dict(cfg_prob=1.5), "--cfg-prob", "'1.5'", "[0, 1]"),
    ("train_ldm_only", dict(model="SiT-T/4"), "--model: SiT-T/4 was given"),
    ("train_ldm_only", dict(encoder_depth=7), "--encoder-depth: 7 was given"),
    # encoder, LPIPS and losses; nothing can be downloaded here
    ("train_repae", dict(enc_type="dinov3"), "--enc-type: 'dinov3' was given", "dinov2-vit-b", "timm:NAME"),
    ("train_repae", dict(enc_type="None"), "--enc-type", "train_ldm_only.py"),
    ("train_repae", dict(enc_type="timm:vit_none"), "--enc-type", "timm:vit_none"),
    ("train_repae", dict(enc_ckpt="{bad}/none.pt"), "--enc-ckpt: {bad}/none.pt"),
    ("train_repae", DINOV2, NO_WEIGHTS, "https://dl.fbaipublicfiles.com", "put it at", "--enc-ckpt"),
    ("train_ldm_only", dict(enc_type="None"), "--enc-type None", "--proj-coeff 0"),
    ("train_repae", LPIPS, "LPIPS needs VGG16", "https://download.pytorch.org", "put it at", "--lpips-weights"),
    ("train_vae", LPIPS, "LPIPS needs VGG16", "--lpips-weights"),
    ("train_vae", LPIPS | dict(lpips_weights="{bad}/other.pt"), "--lpips-weights", "lacks 'features.0.weight'"),
    ("train_repae", dict(loss_cfg_path="{bad}/none.yaml"), "--loss-cfg-path: {bad}/none.yaml cannot be read"),
    ("train_repae", dict(loss_cfg_path="{bad}/unknown_key.yaml"), "--loss-cfg-path", "'perceptual_wait'", "keys are"),
    # the run's folder, and resuming
    ("train_repae", dict(exp_name="run"), "--exp-name: {bad}/exps/run exists", "--resume latest", "--overwrite"),
    ("train_repae", dict(exp_name="mine", overwrite=True), "--overwrite: {bad}/exps/mine has no args.json"),
    ("train_repae", dict(exp_name="file"), "--exp-name: {bad}/exps/file is a file"),
    ("train_repae", dict(output_dir="{bad}/exps/file"), "--output-dir", "{bad}/exps/file is no folder"),
    ("train_vae", dict(exp_name="finished"), "--exp-name: {bad}/exps/finished", "exists already", "--overwrite"),
    ("train_repae", dict(exp_name="run", resume="7"), "--resume", "0000007.pt does not exist", "there: 0000001"),
    ("train_repae", dict(exp_name="run", resume="last"), "--resume: 'last' was given", "'latest'"),
    ("train_repae", dict(exp_name="run", resume="1", resume_step=1), "--resume and --resume-step"),
    ("train_repae", dict(exp_name="run", resume="1", model="SiT-T/1"), "0000001.pt: model has", "shape"),
    ("train_repae", dict(exp_name="ldm", resume="1"), "lacks the entry 'vae'"),
    ("train_ldm_only", dict(exp_name="truncated", resume="1"), "0000001.pt", "truncated"),
    ("train_repae", dict(exp_name="foreign", resume="1"), "datetime.date"),
    ("train_repae", dict(exp_name="no-ema", resume="1"), "lacks the entry 'ema'"),
    ("train_repae", dict(exp_name="no-bias", resume="1"), "model lacks blocks.1.attn.qkv.bias"),
    ("train_repae", dict(exp_name="no-vae-bias", resume="1"), "vae lacks the key 'quant_conv.bias'"),
    ("train_repae", dict(exp_name="no-moments", resume="1"), "opt lacks the moments of t_embedder.mlp.0.weight"),
    ("train_repae", dict(exp_name="no-optimizer", resume="1"), "opt is no optimiser's state dict"),
    ("train_repae", dict(exp_name="new-format", resume="1"), "format 99"),
    # sampling
    ("generate", dict(exp_path="{bad}/exps/none"), "--exp-path: {bad}/exps/none is no folder", "hf download"),
    ("generate", dict(train_steps="7"), "--train-steps", "0000007.pt does not exist", "there: 0000001"),
    ("generate", dict(exp_path="{bad}/exps/truncated"), "0000001.pt", "truncated"),
    ("generate", dict(exp_path="{bad}/exps/foreign"), "datetime.date"),
    ("generate", dict(exp_path="{bad}/exps/no-bias", ema=False), "lacks blocks.1.attn.qkv.bias"),
    ("generate", dict(exp_path="{bad}/exps/ldm", cfg_scale=1.5), "--cfg-scale: 1.5 was given; 1 is needed", "null"),
    ("generate", dict(cfg_scale=0.5), "--cfg-scale", "'0.5'", ">= 1"),
    ("generate", dict(guidance_low=0.7, guidance_high=0.3), "--guidance-low: 0.7 was given", "--guidance-high"),
    ("generate", dict(guidance_high=1.2), "--guidance-high", "'1.2'", "[0, 1]"),
    ("generate", dict(guidance_low=-0.1), "--guidance-low", "[0, 1]"),
]


def command_line(script: str, place, bad, options: dict) -> list[str]:
    filled = {
        key: value.format(bad=bad, place=place.folder) if isinstance(value, str) else value
        for key, value in options.items()
    }
    exps = filled.pop("output_dir", bad / "exps")
    if script in small.OPTIONS:
        return small.OPTIONS[script](place, exps, filled.pop("exp_name", "new"), **filled)
    if script == "cache_latents":
        return small.cache_options(place, "new", **filled)
    usual = {
        "generate": dict(exp_path=exps / "run", sample_dir=bad / "samples", num_fid_samples=4, num_steps=2),
        "save_vae_weights": dict(repae_ckpt=exps / "run" / "checkpoints" / "0000001.pt", save_dir=exps),
        "preprocessing": dict(num_workers=1),
    }[script]
    return small.argv(**usual | filled)


def refused(script: str, argv: list[str], folders, capsys) -> str:
    """The one line that the script leaves with; asserts code 2 and that no file or folder was touched."""
    before = small.listing(*folders)
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        MAIN[script](argv)
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2
    assert len(lines) == 1 and ": error: " in lines[0], lines
    assert small.listing(*folders) == before
    return lines[0]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder, an empty cache of weights, and no network."""

    def no_network(*_, **__):
        raise URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("script", "options", "needed"),
    [(script, options, needed) for script, options, *needed in CASES],
    ids=[f"{script}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for script, options, *_ in CASES],
)
def test_bad_input_is_one_line_and_touches_nothing(script, options, needed, place, bad, alone, capsys):
    argv = command_line(script, place, bad, options)
    line = refused(script, argv, (place.folder, bad, alone), capsys)
    for part in needed:
        assert part.format(bad=bad, place=place.folder) in line, (part, line)


@pytest.mark.parametrize("script", MAIN)
def test_a_disk_that_is_too_small_is_refused(script, place, bad, alone, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 100))
    options = {}
    if script == "preprocessing":
        from PIL import Image

        Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(alone / "one.png")
        options = dict(imagenet_path=str(alone), output_path="{bad}/new", resolution=24)
    line = refused(script, command_line(script, place, bad, options), (place.folder, bad, alone), capsys)
    assert "GB are needed on the disk of" in line and "GB are free" in line
    flag = {"generate": "--sample-dir", "save_vae_weights": "--save-dir", "preprocessing": "--output-path"}
    assert flag.get(script, "--output-dir") in line


def test_latents_of_another_data_set_are_refused(place, bad, alone, capsys):
    other = small.write_data(alone / "other", count=24)
    for suffix in (".npy", ".json"):
        shutil.copy(place.data / f"{place.latents}{suffix}", other)
    line = refused(
        "train_ldm_only",
        small.ldm_options(place, bad / "exps", "new", data_dir=other),
        (place.folder, bad, alone),
        capsys,
    )
    assert "--vae-latents-name" in line and "another data set" in line and "cache_latents.py" in line


def test_latents_that_are_not_finite_are_found_before_the_old_run_is_deleted(place, bad, alone, capsys):
    vae = torch.load(place.vae)
    vae["quant_conv.bias"] = torch.full_like(vae["quant_conv.bias"], float("nan"))
    torch.save(vae, alone / "nan.pt")
    argv = small.repae_options(place, bad / "exps", "run", vae_ckpt=alone / "nan.pt", overwrite=True)
    line = refused("train_repae", argv, (place.folder, bad, alone), capsys)
    assert "--vae-ckpt" in line and "not finite" in line


def test_processes_that_do_not_know_each_other_are_refused(place, bad, alone, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused("train_repae", small.repae_options(place, bad / "exps", "new"), (place.folder, bad, alone), capsys)
    assert "the launcher started 2 processes" in line and "torchrun" in line


def test_a_full_disk_stops_a_run_in_one_line(place, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr("utils.checkpoint.atomic_write", full)
    with pytest.raises(SystemExit) as stopped:
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run", max_train_steps=1, enc_type="None", proj_coeff=0))
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "stopped" in line)
    assert stopped.value.code == 1 and "0000001.pt: not written: no space left" in said


def test_a_run_that_diverges_writes_no_bad_checkpoint_and_fails(place, tmp_path, capsys):
    """At its first checkpoint a line says so; at its end it is an error."""
    argv = small.ldm_options(place, tmp_path, "run", learning_rate=1e30, log_steps=1, checkpointing_steps=2)
    with pytest.raises(SystemExit) as stopped:
        train_ldm_only.main(argv)
    assert stopped.value.code == 1
    bad = "no checkpoint is written; not finite: sit_loss, denoising_loss, proj_loss"
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log if "not finite" in line] == [f"step 2: {bad}"]
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "stopped" in line)
    assert f"stopped: step 4: {bad}; there is no checkpoint yet; to try: lower learning rates" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))
