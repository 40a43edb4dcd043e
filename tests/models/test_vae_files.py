"""The files of a VAE: whole or absent, and as small as their tensors."""

import multiprocessing
import os

import pytest
import torch
from diffusers import AutoencoderKL

from models.vae import build_vae
from models.vae_files import save_vae_files


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae("f4d4-tiny")


def test_files_are_small_and_the_network_is_left_alone(vae, tmp_path):
    before = dict(vae.config)
    views = {"weight": torch.zeros(1_000_000)[:10]}  # torch.save would write the whole storage
    folder = save_vae_files(tmp_path, "v", vae, torch.ones(4), torch.zeros(4), views)
    assert (folder / "v-discriminator-ckpt.pt").stat().st_size < 10_000
    assert dict(vae.config) == before


def test_nothing_is_left_of_a_failed_write(vae, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_vae_files(tmp_path, "v", vae, torch.ones(4), torch.zeros(4))
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_appears_with_all_its_files(vae, monkeypatch, tmp_path):
    """A killed job has run none of its clean-up: what it leaves is no VAE, and the next one removes it."""
    with monkeypatch.context() as patch:
        patch.setattr("models.vae_files._save_diffusers", lambda *_: os._exit(9))
        (killed := multiprocessing.get_context("fork").Process(target=save, args=(tmp_path, vae))).start()
        killed.join()
    (left,) = tmp_path.iterdir()
    assert left.name == f"v.tmp-{killed.pid}"
    folder = save(tmp_path, vae)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {"v.pt", "v-latents-stats.pt", "diffusers"}


def save(folder, vae):
    return save_vae_files(folder, "v", vae, torch.ones(4), torch.zeros(4))
