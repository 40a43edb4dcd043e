"""The VAE's losses and the discriminator: parity with the public implementation, configuration, LPIPS, errors."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import loss.perceptual
from loss.adversarial import DiscriminatorLoss, adversarial_factor, hinge_loss
from loss.config import VAELossConfig, read_loss_config
from loss.perceptual import load_lpips
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator, load_discriminator
from tests.support.golden_data import GOLDEN, close, filled, filled_vgg16, load
from utils.errors import InputError
from utils.images import to_signed
from utils.modules import frozen

ARRAYS, META = load("loss")
DISCRIMINATOR = json.loads((GOLDEN / "manifests.json").read_text())["discriminator"]["state_dict"]
YAML = "configs/l1_lpips_kl_gan.yaml"


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(filled_vgg16() | {"classifier.0.bias": torch.zeros(4096)}, file)
    return file


@pytest.fixture(scope="module")
def lpips(vgg_file):
    return load_lpips(vgg_file)


@pytest.fixture
def discriminator():
    network = PatchDiscriminator()
    network.load_state_dict(filled(DISCRIMINATOR))
    return network


def inputs():
    pixels = to_signed(torch.from_numpy(ARRAYS["in.image_u8"]))
    return pixels, torch.from_numpy(ARRAYS["in.recon"]), torch.from_numpy(ARRAYS["in.moments"])


# Parity


def test_lpips(lpips):
    pixels, reconstruction, _ = inputs()
    reconstruction.requires_grad_()
    value = lpips(pixels, reconstruction)
    close(value, ARRAYS["lpips.value"], 3e-5)
    value.mean().backward()
    close(reconstruction.grad, ARRAYS["lpips.grad_recon_of_mean"], 5e-5)
    close(lpips(pixels, pixels), ARRAYS["lpips.value_same"], 0, 1e-7)
    for i in range(5):
        assert torch.equal(getattr(lpips, f"lin{i}").model[1].weight, torch.from_numpy(ARRAYS[f"lpips.lin{i}"]))


def test_discriminator(discriminator):
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


@pytest.mark.parametrize("variant", META["variants"])
def test_whole_loss(variant, lpips, discriminator):
    settings = META["variants"][variant]
    config = dataclasses.replace(VAELossConfig(), **settings["config_overrides"])
    vae_loss, discriminator_loss = VAELoss(config, lpips), DiscriminatorLoss(config)
    pixels, reconstruction, moments = inputs()
    discriminator.train()
    for number in range(settings["rounds"]):
        prefix = f"full.{variant}." + (f"{number}." if settings["rounds"] > 1 else "")
        check_round(prefix, vae_loss, discriminator_loss, discriminator, pixels, reconstruction, moments, settings)
        pixels = 0.9 * pixels
    if config.lecam_regularization_weight:
        close(discriminator_loss.real_logits_mean, ARRAYS[f"{prefix}ema_real_logits_mean"], 3e-5)
        close(discriminator_loss.fake_logits_mean, ARRAYS[f"{prefix}ema_fake_logits_mean"], 3e-5)


def check_round(prefix, vae_loss, discriminator_loss, discriminator, pixels, reconstruction, moments, settings):
    x, m = reconstruction.clone().requires_grad_(), moments.clone().requires_grad_()
    with frozen(discriminator):
        total, terms = vae_loss(pixels, x, m, discriminator, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        close(value, ARRAYS[f"{prefix}gen.{name}"].reshape(()), 3e-5, 1e-7, what=name)
    close(x.grad, ARRAYS[f"{prefix}gen.grad_recon"], 5e-5)
    close(m.grad, ARRAYS[f"{prefix}gen.grad_moments"], 5e-5)
    assert all(parameter.grad is None for parameter in discriminator.parameters())

    logits = discriminator(pixels), discriminator(reconstruction)
    total, terms = discriminator_loss(*logits, settings["global_step"])
    total.backward()
    for name, value in {**terms, "total": total}.items():
        public = "discriminator_loss" if name == "d_loss" else name
        close(value, ARRAYS[f"{prefix}disc.{public}"].reshape(()), 3e-5, 1e-7, what=name)
    expected_norms = META["disc_grad_l2"].get(prefix.rstrip("."), {})
    for name, parameter in discriminator.named_parameters():
        if (key := f"{prefix}disc.grad.{name}") in ARRAYS:
            close(parameter.grad, ARRAYS[key], 5e-5, what=name)
        if name in expected_norms:
            assert parameter.grad.norm().item() == pytest.approx(expected_norms[name], rel=5e-4, abs=1e-9), name
    for name, buffer in discriminator.named_buffers():
        if (key := f"{prefix}bn_after.{name}") in ARRAYS:
            close(buffer, ARRAYS[key], 3e-5, what=name)
    discriminator.zero_grad()


# Mathematics


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert hinge_loss(torch.full((3,), 1.0), torch.full((3,), -1.0)).item() == 0.0


def test_adversarial_schedule():
    config = VAELossConfig(discriminator_start=10, discriminator_factor=0.5)
    assert [adversarial_factor(config, step) for step in (0, 9, 10, 11)] == [0.0, 0.0, 0.5, 0.5]


def test_without_weights_no_network_is_used():
    config = VAELossConfig(perceptual_weight=0, discriminator_weight=0, kl_weight=0, reconstruction_loss="l2")
    pixels, reconstruction, moments = inputs()
    total, terms = VAELoss(config, None)(pixels, reconstruction, moments, None, 0)  # None: nothing may be called
    assert total.item() == pytest.approx(F.mse_loss(pixels, reconstruction).item())
    assert terms["gan_loss"] == terms["perceptual_loss"] == terms["kl_loss"] == 0


def test_terms_add_up(lpips, discriminator):
    config = VAELossConfig(reconstruction_weight=2.0, logvar_init=-0.3, kl_weight=0.1)
    pixels, reconstruction, moments = inputs()
    total, terms = VAELoss(config, lpips)(pixels, reconstruction, moments, discriminator, 0)
    parts = ("reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss")
    assert total.item() == pytest.approx(sum(terms[part].item() for part in parts), rel=1e-6)
    l1 = (pixels - reconstruction).abs().mean().item()
    assert terms["reconstruction_loss"].item() == pytest.approx(2.0 / math.exp(-0.3) * l1, rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())


def test_losses_are_float32_under_autocast(lpips, discriminator):
    pixels, reconstruction, moments = inputs()
    loss = VAELoss(VAELossConfig(), lpips)
    expected, _ = loss(pixels, reconstruction, moments, discriminator.eval(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(pixels, reconstruction, moments, discriminator, 0)
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_lecam_buffers_survive_a_checkpoint():
    config = VAELossConfig(lecam_regularization_weight=1.0, lecam_ema_decay=0.5)
    first = DiscriminatorLoss(config)
    first(torch.full((2,), 3.0), torch.full((2,), -1.0), 0)
    assert first.state_dict() == {"real_logits_mean": torch.tensor([1.5]), "fake_logits_mean": torch.tensor([-0.5])}
    second = DiscriminatorLoss(config)
    second.load_state_dict(first.state_dict())
    _, terms = second(torch.full((2,), 3.0), torch.full((2,), -1.0), 1)
    assert terms["lecam_loss"].item() == (3.0 + 0.5) ** 2 + (1.5 + 1.0) ** 2


def test_frozen_restores_what_was():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise RuntimeError
    assert module.weight.requires_grad and not module.bias.requires_grad


# Configuration


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
def test_bad_configurations(message, tmp_path):
    (tmp_path / "loss.yaml").write_text(BAD_CONFIGS[message])
    with pytest.raises(InputError, match=message) as error:
        read_loss_config(tmp_path / "loss.yaml")
    assert str(error.value).startswith(f"--loss-cfg-path: {tmp_path}")


def test_missing_configuration(tmp_path):
    with pytest.raises(InputError, match=r"--loss-cfg-path: .*none.yaml cannot be read"):
        read_loss_config(tmp_path / "none.yaml")


# LPIPS and the discriminator from files


def test_lpips_is_frozen_and_takes_no_random_draw(vgg_file, capfd):
    before = torch.get_rng_state()
    lpips = load_lpips(vgg_file)
    assert torch.equal(torch.get_rng_state(), before)
    assert not lpips.training and not any(parameter.requires_grad for parameter in lpips.parameters())
    assert capfd.readouterr().out == ""


def test_bad_lpips_weights(vgg_file, tmp_path):
    with pytest.raises(InputError, match=r"--lpips-weights: .*none.pth does not exist; fetch https.*vgg16.*528 MB"):
        load_lpips(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(InputError, match=r"--lpips-weights: .*page.pth is no torch"):
        load_lpips(tmp_path / "page.pth")
    state = torch.load(vgg_file)
    torch.save(state | {"features.2.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    with pytest.raises(InputError, match=r"'features.2.weight' has shape \(3,\); vgg16 needs \(64, 64, 3, 3\)"):
        load_lpips(tmp_path / "shape.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"is not a torchvision vgg16 state dict: it lacks 'features.0.weight'"):
        load_lpips(tmp_path / "other.pth")


def test_lpips_absent_and_offline(monkeypatch, tmp_path, vgg_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(url, *_, **__):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    place = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(InputError, match="cannot be downloaded") as error:
        load_lpips()
    for part in (loss.perceptual.VGG16_URL, str(place), "--lpips-weights", "528 MB"):
        assert part in str(error.value)
    place.write_bytes(vgg_file.read_bytes())  # put there by hand
    assert load_lpips().lin0.model[1].weight.shape == (1, 64, 1, 1)


def test_discriminator_files(discriminator, tmp_path):
    assert list(discriminator.state_dict()) == list(DISCRIMINATOR)
    torch.save(discriminator.state_dict(), tmp_path / "d.pt")
    again = load_discriminator(tmp_path / "d.pt").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in discriminator.state_dict().items())

    torch.save({k: v for k, v in again.items() if k != "main.3.running_var"}, tmp_path / "d.pt")
    with pytest.raises(InputError, match=r"--disc-pretrained-ckpt: .*d.pt lacks main.3.running_var"):
        load_discriminator(tmp_path / "d.pt")
    with pytest.raises(InputError, match=r"--disc-pretrained-ckpt: .*none.pt does not exist"):
        load_discriminator(tmp_path / "none.pt")


def test_fresh_discriminator():
    torch.manual_seed(0)
    state = load_discriminator(None).state_dict()
    assert state["main.5.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["main.9.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    assert state["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state["main.9.bias"].any()
