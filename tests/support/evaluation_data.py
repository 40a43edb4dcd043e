"""Files that the tests of evaluation share: seeded Inception weights, sets of images, a small encoder."""

import contextlib
import functools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dataset.image_sources import ImageArray
from evaluation.evaluator import FeatureSet, extract
from evaluation.features import exact_float32
from evaluation.inception import Inception, preprocess
from models.vae import build_vae, vae_models
from sampling.generation import SamplerConfig
from tests.support.golden_data import GOLDEN, Tally, load

SEED = json.loads((GOLDEN / "evaluation/expected.json").read_text())["seed"]


def inception_file(folder: Path) -> Path:
    """Weights by the rule of tests/golden/evaluation/README.md, in torch-fidelity's form."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Inception().state_dict().items()}
    state = {key: _weight(key, tuple(shape)) for key, shape in shapes.items() if not key.endswith("tracked")}
    torch.save(state, folder / "inception.pth")
    return folder / "inception.pth"


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    random = np.random.RandomState(zlib.crc32(f"{SEED}:{name}".encode()))
    if name.endswith("conv.weight"):
        value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        value = np.ones(shape)
    elif name.endswith("bn.running_var"):
        value = random.random_sample(shape) + 0.5
    else:
        scale = {"fc.weight": 0.02, "fc.bias": 1.0}.get(name, 0.1)  # else the norms' biases and running means
        value = scale * random.standard_normal(shape)
    return torch.from_numpy(value.astype(np.float32))


def golden_images(side: int) -> torch.Tensor:
    """The two images of the golden features, uint8 (2, 3, side, side)."""
    m, i, j, k = np.ogrid[:2, :side, :side, :3]
    images = (i * (4 + m) + j * (5 + 2 * m) + 29 * k + 7 * ((i * j) // 12) + 37 * m + SEED) % 256
    return as_images(images.astype(np.uint8))


def check_inception(network: Inception, side: int, device: str = "cpu", tally: Tally | None = None) -> None:
    """Features and probabilities are those of the TensorFlow graph; the network has weights of `inception_file`."""
    tally, (arrays, _) = tally or Tally(), load("evaluation/network")
    images, index = golden_images(side).to(device), arrays["resized_index"]
    with exact_float32(torch.device(device)):
        resized = preprocess(images).permute(0, 2, 3, 1).cpu()[:, index][:, :, index]
        pool, spatial = network.to(device)(images)
        probabilities = network.probabilities(pool)
    tally.close("resized pixels", resized, arrays[f"resized_{side}"], 0, 1e-5)
    tally.close("features", pool, arrays[f"pool_{side}"], 0, 1e-4)
    tally.close("features", spatial, arrays[f"spatial_{side}"], 0, 1e-4)
    tally.close("probabilities", probabilities, arrays[f"probs_{side}"], 0, 1e-5)


def random_images(count: int, side: int, seed: int) -> np.ndarray:
    """uint8 (count, side, side, 3): smooth colours with noise, so that sets of other seeds differ."""
    random = np.random.default_rng(seed)
    colours = random.integers(40, 200, (count, 1, 1, 3)) + np.linspace(-30, 30, side)[:, None, None] * random.random()
    return (colours + random.normal(0, 10, (count, side, side, 3))).clip(0, 255).astype(np.uint8)


def as_images(array: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def samples_file(path: Path, count: int, side: int, seed: int) -> Path:
    np.savez(path, arr_0=random_images(count, side, seed))
    return path


def encoder_folder(folder: Path, side: int = 16, seed: int = 0) -> str:
    """A small timm ViT in timm's folder format; returns its name for --features."""
    folder.mkdir()
    arguments = {"img_size": side, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "input_size": [3, side, side]}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    return f"timm:local-dir:{folder}"


class TinyInception(nn.Module):
    """Stands in for Inception: a random linear map, so that metrics can be checked on a few hundred images."""

    label, dim, spatial_dim = "inception", 6, 5

    def __init__(self, seed: int = 0):
        super().__init__()
        self.maps = torch.randn(3 * 8 * 8, 11, generator=torch.Generator().manual_seed(seed)) / 2000
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        both = images.float().flatten(1) @ self.maps
        return both[:, :6], both[:, 6:]

    def probabilities(self, pool):
        return pool.softmax(1)


@contextlib.contextmanager
def few_sampling_steps() -> Iterator[None]:
    """Online evaluations and previews take 3 steps instead of 50: what they promise holds for any number."""
    with contextlib.ExitStack() as stack:
        for module in ("evaluation.online", "sampling.generation"):
            stack.enter_context(mock.patch(f"{module}.SamplerConfig", functools.partial(SamplerConfig, num_steps=3)))
        yield


def small_vae(seed: int = 0) -> nn.Module:
    """A small VAE to reconstruct with; its weights are those of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_vae(vae_models["f4d4-tiny"] | {"block_out_channels": [32, 64, 64]})
    return vae.eval().requires_grad_(False)


def feature_set(images: np.ndarray, network: nn.Module, batch_size: int = 32) -> FeatureSet:
    """The features of uint8 (N, H, W, 3) images."""
    return extract(ImageArray(images, "array"), network, torch.device("cpu"), batch_size=batch_size)
