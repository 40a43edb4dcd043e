"""The files of a VAE: whole or absent, and as small as their tensors."""

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
    assert list((tmp_path / "v").iterdir()) == []
