"""Makers of small things: a data folder, a VAE, an encoder, a loss configuration, and the flags that go with them.

Everything is as small as the networks allow: 24 x 24 pixels are the least that the discriminator takes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import yaml
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from timm.models import save_for_hf

from loss.config import VAELossConfig
from models.discriminator import PatchDiscriminator
from models.vae import build_vae
from models.vae_files import save_vae_files
from training.window import SPEEDS

ROOT = Path(__file__).parents[2]
RESOLUTION, COUNT, CLASSES = 24, 20, 4


def write_data(folder: Path, *, count: int = COUNT, resolution: int = RESOLUTION, classes: int = CLASSES) -> Path:
    """A data folder of noise whose mean grows with the class."""
    folder.mkdir(parents=True)
    labels = np.arange(count) * classes // count
    noise = np.random.default_rng(0).integers(0, 128, (count, 3, resolution, resolution), np.uint8)
    np.save(folder / "images.npy", noise + (32 * labels[:, None, None, None]).astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    (folder / "dataset.json").write_text(json.dumps({"count": count, "resolution": resolution, "sources": []}))
    return folder


def write_vae(folder: Path, name: str = "vae", arch: str = "f4d4-tiny") -> Path:
    """The files of a VAE with fresh weights, made-up latent statistics, and a discriminator; returns `<name>.pt`."""
    torch.manual_seed(0)
    vae, discriminator = build_vae(arch), PatchDiscriminator()
    channels = torch.arange(vae.config.latent_channels) / 10
    save_vae_files(folder, name, vae, 1 + channels, channels - 0.2, discriminator.state_dict())
    return folder / name / f"{name}.pt"


def write_qwen(folder: Path) -> Path:
    """A diffusers folder of Qwen-Image's kind of VAE: 4 channels, 4 times smaller, fresh weights."""
    torch.manual_seed(0)
    statistics = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5])
    shape = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True])
    AutoencoderKLQwenImage(**shape, **statistics).save_pretrained(folder)
    return folder


def write_flux2(folder: Path) -> Path:
    """A diffusers folder of FLUX.2's kind of VAE: 4 channels, 2 times smaller, in patches of 2 x 2; fresh weights."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    shape = dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4)
    vae = AutoencoderKLFlux2(**blocks, **shape)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> str:
    """A timm ViT with fresh weights as a folder; returns its `--enc-type`. Its tokens are 6 x 6, those of SiT 3 x 3."""
    torch.manual_seed(0)
    size, half = RESOLUTION, (0.5, 0.5, 0.5)
    shape = dict(img_size=size, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    network = timm.create_model("vit_tiny_patch16_224", **shape)
    data_config = {"input_size": (3, size, size), "mean": half, "std": half, "interpolation": "bicubic"}
    save_for_hf(network, folder, data_config=data_config, model_args=shape, safe_serialization=True)
    return f"timm:local-dir:{folder}"


def write_loss_config(path: Path, **values: float) -> Path:
    """The default loss without LPIPS, and with LeCam, whose running means are state that a resumed run needs."""
    values = {"perceptual_weight": 0, "lecam_regularization_weight": 0.1, **values}
    assert values.keys() <= VAELossConfig.__dataclass_fields__.keys()
    path.write_text(yaml.safe_dump(values))
    return path


SIT = dict(model="SiT-T/2", encoder_depth=2, num_classes=CLASSES)
ON_A_CARD = dict(resolution=128, sit=SIT | dict(model="SiT-S/2", encoder_depth=4))  # what a GPU's kernels are made for


def write_place(folder: Path, *, resolution: int = RESOLUTION, sit: dict = SIT, **data) -> SimpleNamespace:
    """All inputs of the training scripts below one folder; cached latents are added by `tests/conftest.py`.

    Args:
        sit: options of the SiT that trains on it.
        data: of `write_data`.
    """
    place = SimpleNamespace(folder=folder, latents="latents", resolution=resolution, sit=sit)
    place.data = write_data(folder / "data", resolution=resolution, **data)
    place.vae, place.discriminator = write_vae(folder), folder / "vae" / "vae-discriminator-ckpt.pt"
    place.encoder, place.loss = write_encoder(folder / "encoder"), write_loss_config(folder / "loss.yaml")
    return place


def argv(**options) -> list[str]:
    """Options as a command line: True is `--x`, False is `--no-x`, None leaves the flag out; a list is many words."""
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


TINY_VAE = "f4d4-tiny"
FOUR_STEPS = dict(max_train_steps=4, checkpointing_steps=2, log_steps=1, num_preview=0)


def training(place: SimpleNamespace, **options) -> dict:
    data = dict(data_dir=place.data, resolution=place.resolution, batch_size=8, num_workers=0)
    return data | FOUR_STEPS | dict(mixed_precision="no", report_to="none") | options


def repae_options(place: SimpleNamespace, output: Path, name: str, **options) -> list[str]:
    """The command line of a small run of train_repae.py; options replace the usual ones."""
    usual = training(place, vae=TINY_VAE, vae_ckpt=place.vae, enc_type=place.encoder, **place.sit)
    usual |= dict(disc_pretrained_ckpt=place.discriminator, loss_cfg_path=place.loss)
    return argv(**usual | dict(output_dir=output, exp_name=name) | options)


def ldm_options(place: SimpleNamespace, output: Path, name: str, **options) -> list[str]:
    """The command line of a small run of train_ldm_only.py."""
    usual = training(place, vae=TINY_VAE, vae_ckpt=place.vae, enc_type=place.encoder, **place.sit)
    usual |= dict(vae_latents_name=place.latents)
    return argv(**usual | dict(output_dir=output, exp_name=name) | options)


def vae_options(place: SimpleNamespace, output: Path, name: str, **options) -> list[str]:
    """The command line of a small run of train_vae.py."""
    usual = training(place, vae=TINY_VAE, loss_cfg_path=place.loss)
    return argv(**usual | dict(output_dir=output, exp_name=name) | options)


def cache_options(place: SimpleNamespace, name: str, **options) -> list[str]:
    """The command line of cache_latents.py, which writes into the data folder."""
    usual = dict(vae_arch=TINY_VAE, vae_ckpt_path=place.vae, vae_latents_name=name, pproc_batch_size=8, num_workers=0)
    return argv(**usual | dict(data_dir=place.data, output_dir=place.data) | options)


OPTIONS = {"train_repae": repae_options, "train_ldm_only": ldm_options, "train_vae": vae_options}


def listing(*folders: Path) -> dict[str, tuple]:
    """Every file and folder below, with what would show that it was touched."""
    found = {}
    for path in [path for folder in folders for path in (folder, *folder.rglob("*"))]:
        status = path.stat()
        found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def checkpoint(output: Path, name: str, step: int) -> dict:
    """Without `made_by`, which is the command's."""
    path = output / name / "checkpoints" / f"{step:07d}.pt"
    return {key: value for key, value in torch.load(path, weights_only=True).items() if key != "made_by"}


def metrics(output: Path, name: str) -> list[dict]:
    """The rows of metrics.jsonl, which is JSON without NaN, and without the speed, which no two runs share."""
    lines = (output / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=_refuse) for line in lines]
    return [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def _refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def assert_same(actual, expected, where: str = "checkpoint") -> None:
    """Nested dicts, lists and tensors are equal bit for bit."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}: {key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}: {i}")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    else:
        assert actual == expected, where


def assert_same_training(output: Path, name: str, reference: tuple[Path, str], step: int = 4) -> None:
    """Every entry of the checkpoint but the arguments, and every row of the metrics."""
    actual, expected = checkpoint(output, name, step), checkpoint(*reference, step)
    assert actual.pop("args") and expected.pop("args")
    assert_same(actual, expected)
    assert metrics(output, name) == metrics(*reference)


# Of train_repae with one micro-step: see the killed run below.


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def run_python(*words, **options) -> subprocess.CompletedProcess:
    """`python ...` from the repository's root, on one thread; its output is text."""
    usual = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    return subprocess.run([sys.executable, *map(str, words)], **usual | options)
