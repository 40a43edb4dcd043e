"""Inception-v3 of 2015-12-05, the network behind FID, sFID, Inception Score and ADM's precision and recall.

The graph is torch-fidelity's port of the TensorFlow original, block by block: state-dict names are those of its weights
file, until its BatchNorms are folded away. Only the forward pass is ours, because it also gives sFID's features, and
because the file is read without unpickling it freely.
"""

import logging
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.errors import InputError
from utils.hub import cache_path, download, fetch_once
from utils.torch_files import read_torch_file

logger = logging.getLogger(__name__)

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
FILE = URL.rsplit("/", 1)[1]
SHA256 = "6726825d"  # its beginning
SIZE = "96 MB"
INPUT_SIZE = 299
SPATIAL_CHANNELS = 7  # sFID (Nash et al. 2021, arXiv 2103.03841): the first 7 channels of mixed_6/conv, 17 x 17 each


class Inception(nn.Module):
    """Inception-v3: images -> (pool features, spatial features), and pool features -> class probabilities.

    Attributes:
        dim: 2048, of the pool features (FID, precision, recall, Inception Score).
        spatial_dim: 2023 = 17 x 17 x 7, of the spatial features (sFID).
    """

    label = "inception"
    dim = 2048
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self):
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as blocks  # late: it imports scipy and torchvision

        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of ADM's evaluation suite.

        Args:
            images: uint8 (B, 3, H, W), any size.
        Returns:
            pool float32 (B, 2048); spatial float32 (B, 2023), flattened in the order height, width, channel.
        """
        x = preprocess(images)  # (B, 3, 299, 299)
        if x.device.type == "cpu":  # half as fast again; on a GPU, where float32 has no TF32 here, not measured yet
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.MaxPool_1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.MaxPool_2(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        # TensorFlow's mixed_6/conv is the 1 x 1 branch of Mixed_6d, which comes first in its concatenated output.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, 1008) of pool features (B, 2048); ADM's suite leaves the bias out."""
        return (pool @ self.fc.weight.T).softmax(1)


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), about [-1, 1), as TensorFlow 1 resizes.

    Bilinear, with output pixel i at input position i * H / 299: no half-pixel centres, no antialiasing.
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    return (resize(images.float(), size=(INPUT_SIZE, INPUT_SIZE), align_corners=False) - 128) / 128


def load_inception(weights: str | Path | None = None) -> Inception:
    """The frozen network with its public weights, on the CPU, its BatchNorms folded (`fold_batch_norms`).

    Args:
        weights: torch-fidelity's weights file; None: the torch-hub cache, downloaded into it when it is not there.
    Raises:
        InputError: the file is missing (and cannot be downloaded), unreadable, or holds another network.
    """
    path = _download() if weights is None else Path(weights)
    if not path.is_file():
        raise InputError(f"{path} does not exist; {FILE} ({SIZE}) is needed, from {URL}")
    state = read_torch_file(path)
    with torch.device("meta"):  # every weight comes from the file; no random number is drawn
        network = Inception()

    # Exactly its keys and shapes, but for counters, which old files lack.
    expected = network.state_dict()
    counters = {key: torch.zeros(()) for key in expected if key.endswith("num_batches_tracked")}
    state = counters | state
    for key in sorted(expected.keys() | state.keys()):
        if key not in expected or getattr(state.get(key), "shape", None) != expected[key].shape:
            what = "is unknown" if key not in expected else "is missing" if key not in state else "has another shape"
            raise InputError(f"{path} is not {FILE}: {key} {what}")
    state = {key: tensor.to(expected[key].dtype, copy=True) for key, tensor in state.items()}
    network.load_state_dict(state, assign=True)
    return fold_batch_norms(network.requires_grad_(False).eval())


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Every BatchNorm's scale and shift into its convolution's weights, in place: the same function, up to rounding.

    Args:
        network: in eval mode, so that its BatchNorms are fixed maps. They are computed in float64, once.
    Returns:
        the network, float32; `bn.*` are gone from its state dict, each `conv.weight` has a `conv.bias` beside it.
    """
    network.double()
    for block in network.modules():
        if hasattr(block, "bn"):  # a BasicConv2d: convolution, BatchNorm, ReLU
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network.float()


def _download() -> Path:
    def fetch(path: Path) -> None:
        logger.info("downloading %s (%s) to %s", URL, SIZE, path)
        download(URL, path, SHA256)

    try:
        return fetch_once(URL, fetch)
    except (OSError, RuntimeError) as error:
        problem = f"the Inception weights are absent and could not be downloaded ({error})"
        place = f"put it at {cache_path(URL)}, or name it with --inception-weights"
        raise InputError(f"{problem}; get {FILE} ({SIZE}) from {URL} and {place}") from error
