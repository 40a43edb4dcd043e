"""The patch discriminator of pix2pix (arXiv 1611.07004): a logit for every patch of 70 x 70 pixels.

State-dict keys `main.N.*` are those of the public discriminator files.
"""

from pathlib import Path

from torch import Tensor, nn

from utils.errors import InputError, about
from utils.modules import load_strictly
from utils.torch_files import read_torch_file

SMALLEST_IMAGE = 24  # side of the images that still give one logit


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions with batch normalisation: pixels [-1, 1] (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2).

    The batch statistics are those of one call, so real and reconstructed images go through separate calls.
    """

    def __init__(self, in_channels: int = 3, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for before, after, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [
                nn.Conv2d(before * width, after * width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after * width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(8 * width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.main(pixels)


def _initialise(module: nn.Module) -> None:
    """Of pix2pix: convolutions N(0, 0.02), norm scales N(1, 0.02); biases of the convolutions keep torch's own draw."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def load_discriminator(path: str | Path | None) -> PatchDiscriminator:
    """A discriminator: fresh without a path, else with the weights and batch statistics of a file.

    Public files lie beside the public VAEs; save_vae_weights.py writes `<name>-discriminator-ckpt.pt`.

    Raises:
        InputError: the file is missing, unreadable, or not exactly this network's state dict.
    """
    discriminator = PatchDiscriminator()
    if path is not None:
        with about("--disc-pretrained-ckpt"):
            if not Path(path).is_file():
                advice = "`hf download REPA-E/sdvae` has a public one, and without the flag it starts fresh"
                raise InputError(f"{path} does not exist; {advice}")
            load_strictly(discriminator, read_torch_file(path), str(path))
    return discriminator


def require_resolution(resolution: int) -> None:
    """Refuse images that are too small for a single logit.

    Raises:
        InputError: the side of the images, in pixels, is below `SMALLEST_IMAGE`.
    """
    if resolution < SMALLEST_IMAGE:
        raise InputError(f"--resolution: {resolution} was given; the discriminator needs {SMALLEST_IMAGE} or more")
