"""The kinds of VAE: each gives what its own pipeline in diffusers computes, behind the same few functions."""

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage

from models.posterior import decode, encode_moments, measure_latent_statistics, split_moments
from models.vae import downsampling, latent_channels, latent_shape, latent_statistics, load_vae, require_trainable
from models.vae_files import vae_sha256
from tests.support.refusals import refusal
from tests.support.small import write_flux2, write_qwen


def patchified(latents):
    """(B, C, 2h, 2w) -> (B, 4C, h, w) as Flux2Pipeline: channel 4c + 2y + x holds position (y, x) of c's patches."""
    patches = [latents[:, c, y::2, x::2] for c in range(latents.shape[1]) for y in (0, 1) for x in (0, 1)]
    return torch.stack(patches, dim=1)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = write_qwen(tmp_path_factory.mktemp("qwen"))
    return path, load_vae("auto", path)


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    path = write_flux2(tmp_path_factory.mktemp("flux2"))
    return path, load_vae("auto", path)


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.rand(2, 3, 32, 32) * 2 - 1


def assert_equal_weights(path, network, vae):
    plain = network.from_pretrained(path).state_dict()
    assert plain.keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in vae.state_dict().items())


@torch.no_grad()
def test_qwens_vae_sees_an_image_as_a_video_of_one_frame(qwen, pixels):
    path, vae = qwen
    assert type(vae) is AutoencoderKLQwenImage and not vae.training
    assert_equal_weights(path, AutoencoderKLQwenImage, vae)
    assert (latent_channels(vae), downsampling(vae), latent_shape(vae, 32)) == (4, 4, (4, 8, 8))
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    mean, logvar = split_moments(encode_moments(vae, pixels))
    assert mean.shape == (2, 4, 8, 8)
    assert torch.equal(mean, posterior.mean[:, :, 0]) and torch.equal(logvar, posterior.logvar[:, :, 0])
    assert torch.equal(decode(vae, mean), vae.decode(posterior.mean).sample[:, :, 0])

    # As QwenImagePipeline undoes its normalisation: latents / (1 / std) + mean.
    scale, bias = latent_statistics(path, vae)
    assert torch.equal(scale.flatten(), 1 / torch.tensor(vae.config.latents_std))
    assert torch.equal(bias.flatten(), torch.tensor(vae.config.latents_mean))


@torch.no_grad()
def test_flux2s_latents_are_patches_normalised_by_its_own_batchnorm(flux2, pixels):
    path, vae = flux2
    assert type(vae) is AutoencoderKLFlux2 and not vae.training
    assert_equal_weights(path, AutoencoderKLFlux2, vae)
    assert (latent_channels(vae), downsampling(vae), latent_shape(vae, 32)) == (16, 4, (16, 8, 8))
    posterior = vae.encode(pixels).latent_dist
    patches = patchified(posterior.mean)
    mean, logvar = split_moments(encode_moments(vae, pixels))
    assert torch.equal(mean, patches) and torch.equal(logvar, patchified(posterior.logvar))
    assert torch.equal(decode(vae, mean), vae.decode(posterior.mean).sample)

    # As Flux2Pipeline normalises them.
    scale, bias = (values.flatten() for values in latent_statistics(path, vae))
    assert torch.allclose(1 / scale, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps), rtol=1e-6)
    assert torch.equal(bias, vae.bn.running_mean)


@pytest.mark.parametrize("kind", ["qwen", "flux2"])
def test_latents_of_any_kind_can_be_measured(kind, request):
    _, vae = request.getfixturevalue(kind)

    class Images(list):
        def __getitems__(self, indices):
            return (torch.stack([self[i] for i in indices]),)

    torch.manual_seed(0)
    images = Images(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
    scale, bias = measure_latent_statistics(vae, images, device="cpu", batch_size=2)
    assert scale.shape == bias.shape == (1, latent_channels(vae), 1, 1) and (scale > 0).all()


@pytest.mark.parametrize("kind", ["qwen", "flux2"])
def test_other_kinds_are_refused_for_training_by_name_and_with_the_reason(kind, request):
    path, vae = request.getfixturevalue(kind)
    message = refusal(require_trainable, vae)
    assert f"--vae-ckpt: an {type(vae).__name__} cannot be trained here: " in message and "LDM keys" in message
    assert "cache_latents.py and train_ldm_only.py take it frozen" in message
    assert f"holds a {type(vae).__name__}; --vae f8d4 is an AutoencoderKL" in refusal(load_vae, "f8d4", path)


def test_the_checksum_of_any_kind_is_that_of_its_weights(qwen, flux2):
    for path, vae in (qwen, flux2):
        before = vae_sha256(path, vae)
        assert before == vae_sha256(path, load_vae("auto", path))
        name, tensor = next(iter(vae.state_dict().items()))
        old = tensor.clone()
        tensor.add_(1)
        assert vae_sha256(path, vae) != before, name
        tensor.copy_(old)
