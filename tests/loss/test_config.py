"""The loss configuration: the public one, the public layout, and what is refused."""

import pytest

from loss.config import VAELossConfig, read_loss_config
from utils.errors import InputError

YAML = "configs/l1_lpips_kl_gan.yaml"


def test_the_shipped_configuration_is_the_public_one():
    assert read_loss_config(YAML) == VAELossConfig()


def test_public_layout_and_numbers_that_yaml_reads_as_strings(tmp_path):
    file = tmp_path / "public.yaml"
    file.write_text(
        "model:\n  vq_model:\n    quantize_mode: vae\n"
        "losses:\n  kl_weight: 1e-7\n  discriminator_start: 5e1\n  quantizer_weight: 1.0\n  perceptual_loss: lpips\n"
    )
    assert read_loss_config(file) == VAELossConfig(kl_weight=1e-7, discriminator_start=50)


BAD_CONFIGS = {
    "unknown key 'kl_wieght'": "kl_wieght: 1",
    "kl_weight is 'small'; a number is needed": "kl_weight: small",
    "kl_weight is -1; a number >= 0": "kl_weight: -1",
    "kl_weight is nan": "kl_weight: .nan",
    "perceptual_weight is True; a number": "perceptual_weight: yes",
    "discriminator_start is 1.5; a whole number": "discriminator_start: 1.5",
    "reconstruction_loss is 'huber'; 'l1' or 'l2'": "reconstruction_loss: huber",
    "lecam_ema_decay is 2; a number in": "lecam_ema_decay: 2",
    "perceptual_loss is 'convnext'; 'lpips' is supported": "perceptual_loss: convnext",
    "is not YAML": "a: [1",
    "has no 'key: value' lines": "just text",
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_a_bad_configuration_is_refused_with_its_key(message, tmp_path):
    (tmp_path / "loss.yaml").write_text(BAD_CONFIGS[message])
    with pytest.raises(InputError, match=message) as error:
        read_loss_config(tmp_path / "loss.yaml")
    assert str(error.value).startswith(f"--loss-cfg-path: {tmp_path}")


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--loss-cfg-path: .*none.yaml cannot be read"):
        read_loss_config(tmp_path / "none.yaml")
