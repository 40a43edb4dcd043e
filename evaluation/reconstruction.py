"""How well a VAE reconstructs, and what its latents look like.

As in RAE's evaluation, every number is taken on the images a user would see: clamped, times 255, truncated to uint8.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from dataset.image_sources import Source, read_batches
from evaluation.evaluator import NOTHING, FeatureSet, FeatureStream, warn_if_few
from evaluation.features import exact_float32
from evaluation.metrics import frechet_distance, psnr, ssim
from models.posterior import decode, encode_moments, split_moments
from models.vae import downsampling
from utils.distributed import gather_rows, rank, together, world_size
from utils.errors import InputError
from utils.images import image_grid, to_signed, to_uint8

DIFFERENCE_GAIN = 4  # in the picture
SMALLEST_SHOWN = 96  # pixels; smaller images are enlarged by whole factors


def reconstruct(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions uint8 (B, 3, H, W) through the posterior's mean, and that mean z (B, C, h, w).

    Raises:
        InputError: a value is not finite; as an image it would be measured like any other.
    """
    z, _ = split_moments(encode_moments(vae, to_signed(images)))
    pixels = decode(vae, z)
    if not pixels.isfinite().all():
        raise InputError("the VAE's reconstruction of some image is not finite: its weights are damaged")
    return to_uint8(pixels), z


def measure_reconstruction(
    vae: AutoencoderKL,
    source: Source,
    device: torch.device,
    *,
    batch_size: int = 64,
    network: nn.Module | None = None,
    originals: FeatureSet | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Reconstruction metrics over all processes, on each of them, whatever the batch size.

    Args:
        vae: on `device`.
        network: feature network for rFID (or the distance of another space), on `device`; None: left out.
        originals: the source's features in that network (`evaluation.evaluator.extract`); they go together.
        lpips: (pixels, pixels) in [-1, 1] -> (B, 1, 1, 1), on `device`; None: left out.
    Returns:
        psnr (dB), ssim, lpips: means of the per-image values; rfid, or rfd_<label> in another space than Inception's.
    Raises:
        InputError: images that the VAE cannot take, reconstructions that are not finite.
    """
    assert (network is None) == (originals is None), "the network and the originals' features go together"
    check_size(vae, source, lpips=lpips is not None)
    stream = None if network is None else FeatureStream(network, device, batch_size=batch_size, keep=NOTHING)

    # This process's share of the images; empty rows first, as a process may have no image at all.
    numbers, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 3, dtype=torch.float64)]
    bar = tqdm(total=len(source), desc="reconstruction", unit="image", disable=rank() > 0)
    with together(), bar:
        for indices, images in read_batches(source, batch_size, rank=rank(), world_size=world_size()):
            images = images.to(device)
            with exact_float32(device):
                reconstructions = _reconstruct_padded(vae, images, batch_size)
                values.append(_per_image(images, reconstructions, lpips))
            numbers.append(indices)
            if stream is not None:
                stream.add(reconstructions, indices)
            bar.update(min(len(source) - bar.n, batch_size * world_size()))

    # Means over all, summed in the order of the images, whoever measured them.
    numbers, values = gather_rows(torch.cat(numbers)), gather_rows(torch.cat(values))
    means = values[numbers.argsort()].mean(0).tolist()
    results = dict(zip(("psnr", "ssim", "lpips"), means, strict=True))
    if lpips is None:
        del results["lpips"]

    if stream is not None:
        warn_if_few("reconstructions", len(source), network.dim)
        name = "rfid" if network.label == "inception" else f"rfd_{network.label}"
        results[name] = frechet_distance(*originals.pool, *stream.finish().pool)
    return results


def check_size(vae: AutoencoderKL, source: Source, *, lpips: bool) -> None:
    """Raise `InputError` unless the VAE and the metrics take the images."""
    factor, smallest = downsampling(vae), 16 if lpips else 11  # VGG16 halves four times; the window of SSIM
    if any(side % factor or side < smallest for side in source.size):
        height, width = source.size
        needed = f"multiples of {factor}, {smallest} at least, are needed"
        raise InputError(f"{source.name} has {height} x {width} images; {needed}")


def _reconstruct_padded(vae: AutoencoderKL, images: Tensor, batch_size: int) -> Tensor:
    """Always a full batch: kernels may round differently at another size, and a rounding can flip a level."""
    padding = images[-1:].expand(batch_size - len(images), -1, -1, -1)
    return reconstruct(vae, torch.cat([images, padding]))[0][: len(images)]


def _per_image(images: Tensor, reconstructions: Tensor, lpips: Callable | None) -> Tensor:
    """PSNR, SSIM and LPIPS (0 without network) of each image: float64 (B, 3) on the CPU."""
    x, y = images / 255, reconstructions / 255
    distance = torch.zeros(len(x)) if lpips is None else lpips(2 * y - 1, 2 * x - 1).flatten()
    return torch.stack([column.double().cpu() for column in (psnr(y, x), ssim(y, x), distance)], dim=1)


def latent_colours(z: Tensor, size: tuple[int, int]) -> Tensor:
    """The first three principal components of latents as colours, as in the paper's figures on latent structure.

    The components are taken over all positions of all latents given; each fills 0..255 between its 1st and 99th
    percentile, with the sign that makes its largest loading positive. Where there are fewer than three channels, the
    rest is black.

    Args:
        z: (B, C, h, w).
        size: height and width of the pictures (positions become squares of equal pixels).
    Returns:
        uint8 (B, 3, H, W).
    """
    # Principal axes, with a sign that does not depend on the library.
    points = z.double().permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
    points = points - points.mean(0)
    axes = torch.linalg.svd(points, full_matrices=False)[2][:3]  # (3, C)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()

    # Components along them, spread over 0..1.
    components = points @ axes.T  # (B h w, 3)
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    components = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    components = F.pad(components, (0, 3 - components.shape[1]))

    colours = components.unflatten(0, (len(z), *z.shape[2:])).permute(0, 3, 1, 2)
    return (F.interpolate(colours, size=size, mode="nearest") * 255).byte()


def comparison_picture(images: Tensor, vaes: dict[str, AutoencoderKL]) -> np.ndarray:
    """A picture of originals and, for each VAE, its reconstructions, their differences and its latents.

    Args:
        images: uint8 (B, 3, H, W) on the VAEs' device; a column for each.
        vaes: caption -> VAE.
    Returns:
        uint8 (height, width, 3), with captions above the rows.
    """
    rows = [("originals", images)]
    for caption, vae in vaes.items():
        with exact_float32(images.device):
            reconstructions, z = reconstruct(vae, images)
        difference = (127.5 + DIFFERENCE_GAIN * (reconstructions.float() - images.float())).clamp(0, 255).byte()
        rows += [
            (f"{caption}: reconstructions", reconstructions),
            (f"{caption}: differences x {DIFFERENCE_GAIN}", difference),
            (f"{caption}: latents, first 3 principal components", latent_colours(z, images.shape[-2:])),
        ]
    strips = [(text, _strip(row)) for text, row in rows]
    return np.concatenate([part for text, strip in strips for part in (_caption(text, strip.shape[1]), strip)])


def _strip(images: Tensor) -> np.ndarray:
    zoom = max(1, SMALLEST_SHOWN // images.shape[-1])
    return image_grid(images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), columns=len(images))


def _caption(text: str, width: int, height: int = 20) -> np.ndarray:
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((4, 3), text, fill="black", font=ImageFont.load_default(12))
    return np.asarray(strip)
