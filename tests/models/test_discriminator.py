"""The discriminator: parity with the public implementation, its file, and fresh weights."""

import pytest
import torch

from models.discriminator import load_discriminator
from tests.support.golden_data import close
from tests.support.loss_data import ARRAYS, DISCRIMINATOR, filled_discriminator, inputs
from utils.errors import InputError


@pytest.fixture
def discriminator():
    return filled_discriminator()


def test_logits_and_batch_statistics_are_those_of_the_public_code(discriminator):
    pixels, reconstruction, _ = inputs()
    with torch.no_grad():
        discriminator.eval()
        close(discriminator(pixels), ARRAYS["disc.eval.logits_image"], 3e-5)
        close(discriminator(reconstruction), ARRAYS["disc.eval.logits_recon"], 3e-5)
        discriminator.train()
        for images, name, after in ((pixels, "image", "after1"), (reconstruction, "recon", "after2")):
            close(discriminator(images), ARRAYS[f"disc.train.logits_{name}"], 3e-5)
            for key, buffer in discriminator.named_buffers():
                close(buffer, ARRAYS[f"disc.train.{after}.{key}"], 3e-5, what=key)


def test_a_file_loads_strictly(discriminator, tmp_path):
    assert list(discriminator.state_dict()) == list(DISCRIMINATOR)
    torch.save(discriminator.state_dict(), tmp_path / "d.pt")
    again = load_discriminator(tmp_path / "d.pt").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in discriminator.state_dict().items())

    torch.save({k: v for k, v in again.items() if k != "main.3.running_var"}, tmp_path / "d.pt")
    with pytest.raises(InputError, match=r"--disc-pretrained-ckpt: .*d.pt lacks main.3.running_var"):
        load_discriminator(tmp_path / "d.pt")
    with pytest.raises(InputError, match=r"--disc-pretrained-ckpt: .*none.pt does not exist"):
        load_discriminator(tmp_path / "none.pt")


def test_fresh_weights_have_the_public_distribution():
    torch.manual_seed(0)
    state = load_discriminator(None).state_dict()
    assert state["main.5.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["main.9.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    assert state["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state["main.9.bias"].any()
