"""Reconstruction metrics, the latents in colours, and the picture of a VAE before and after."""

import numpy as np
import pytest
import torch

from dataset.image_sources import ImageArray, Subset
from evaluation.evaluator import extract
from evaluation.metrics import frechet_distance, psnr, ssim
from evaluation.reconstruction import comparison_picture, latent_colours, measure_reconstruction, reconstruct
from tests.support.evaluation_data import random_images, small_vae
from utils.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture(scope="module")
def source():
    return ImageArray(random_images(11, 16, 0), "images")


def test_metrics_are_means_over_the_images_that_a_user_sees(vae, source):
    seen = []

    def lpips(x, y):
        seen.append((x.min().item(), y.max().item(), x.shape))
        return (x - y).abs().mean((1, 2, 3), keepdim=True)

    found = measure_reconstruction(vae, source, CPU, batch_size=11, lpips=lpips)
    images = source.read(0, 11)
    reconstructions, z = reconstruct(vae, images)
    assert reconstructions.dtype == torch.uint8 and z.shape == (11, 4, 4, 4)
    x, y = images / 255, reconstructions / 255
    expected = {
        "psnr": psnr(y, x).mean().item(),
        "ssim": ssim(y, x).mean().item(),
        "lpips": 2 * (x - y).abs().mean().item(),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert seen == [(2 * y.min().item() - 1, 2 * x.max().item() - 1, images.shape)]  # [-1, 1], each once


def test_the_posterior_mean_is_decoded(vae, source):
    images = source.read(0, 3)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    pixels = vae.decode(posterior.mode()).sample
    found, z = reconstruct(vae, images)
    torch.testing.assert_close(z, posterior.mean, rtol=0, atol=1e-6)
    difference = found.float() - ((pixels + 1) / 2).clamp(0, 1) * 255
    assert difference.min() > -1 and difference.max() < 1e-3  # truncated, not rounded


class Pool(torch.nn.Module):
    """A space of three dimensions: the mean colour."""

    label, dim, spatial_dim = "inception", 3, 0

    def forward(self, images):
        return images.float().mean((2, 3)), None


def test_numbers_do_not_depend_on_the_batch_size(vae, source):
    originals = extract(source, Pool(), CPU)
    found = [
        measure_reconstruction(vae, source, CPU, batch_size=size, network=Pool(), originals=originals)
        for size in (1, 4, 11, 64)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)
    assert list(found[0]) == ["psnr", "ssim", "rfid"]
    images = source.read(0, 11)
    features = [Pool()(x)[0].double() for x in (images, reconstruct(vae, images)[0])]
    moments = [moment for x in features for moment in (x.mean(0), x.T.cov())]
    assert found[0]["rfid"] == pytest.approx(frechet_distance(*moments), rel=1e-4) and found[0]["rfid"] > 1


def test_few_images_are_warned_about(vae, source, caplog):
    few = Subset(source, range(3))
    measure_reconstruction(vae, few, CPU, network=Pool(), originals=extract(few, Pool(), CPU))
    assert "reconstructions: 3 images for 3 dimensions: the covariance is singular" in caplog.text


def test_a_damaged_vae_gets_no_numbers(source):
    vae = small_vae()
    vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="reconstruction of some image is not finite"):
        measure_reconstruction(vae, source, CPU)


def test_latent_colours_show_the_principal_components():
    """Latents made of three orthogonal patterns of falling strength: each fills one colour channel."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    patterns = [9 * rows, 3 * columns, rows * columns]
    axes = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).Q
    z = sum(axis[:, None, None] * pattern for axis, pattern in zip(axes.T, patterns, strict=True))[None] + 7
    colours = latent_colours(z, (16, 16))
    assert colours.shape == (1, 3, 16, 16) and colours.dtype == torch.uint8
    small = colours[0, :, ::2, ::2].double()
    assert torch.equal(colours[0, :, 1::2, 1::2].double(), small)  # positions are squares
    for channel, pattern in zip(small, patterns, strict=True):
        inside = (channel > 0) & (channel < 255)
        assert abs(torch.stack([channel[inside], pattern[inside].double()]).corrcoef()[0, 1]) > 0.999
    rescaled = latent_colours(3 * z - 2, (16, 16))
    assert (rescaled.int() - colours.int()).abs().max() <= 1  # rounding


def test_latents_of_few_channels_have_black_for_the_rest():
    colours = latent_colours(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), (4, 4))
    assert colours[:, :2].amax() == 255 and colours[:, 2].amax() == 0


def test_picture_has_a_row_of_originals_and_three_for_each_vae(vae):
    images = torch.from_numpy(random_images(3, 96, 0)).permute(0, 3, 1, 2)
    picture = comparison_picture(images, {"before": vae, "after": small_vae(1)})
    assert picture.shape == (7 * (20 + 96), 3 * 96, 3)
    np.testing.assert_array_equal(picture[20:116, 96:192], images[1].permute(1, 2, 0))
    reconstructions, _ = reconstruct(vae, images)
    np.testing.assert_array_equal(picture[136:232, 192:], reconstructions[2].permute(1, 2, 0))
    difference = 127.5 + 4 * (reconstructions[0].float() - images[0].float())
    np.testing.assert_array_equal(picture[252:348, :96], difference.clamp(0, 255).byte().permute(1, 2, 0))
