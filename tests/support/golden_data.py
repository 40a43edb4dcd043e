"""Access to the golden fixtures: numbers of the public implementation (see tests/golden/README.md)."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

from tests.golden.fill import fill as fill_array
from tests.golden.fill import subsample

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and description of one fixture; `name` may carry a folder ("evaluation/metrics")."""
    meta = GOLDEN / f"{name}.json"
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays), json.loads(meta.read_text()) if meta.exists() else {}


def fill(key: str, shape) -> torch.Tensor:
    """The deterministic weight of a public state-dict key."""
    return torch.from_numpy(fill_array(key, shape))


def filled(manifest: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A whole state dict of filled weights, without SiT's fixed `pos_embed`."""
    return {key: fill(key, shape) for key, shape in manifest.items() if key != "pos_embed"}


class Tally:
    """Differences as shares of their tolerances; the largest of every kind is kept in `shares`.

    Args:
        limit: a larger share fails at once.
    """

    def __init__(self, limit: float = 1):
        self.limit, self.shares = limit, {}

    def within(self, kind: str, difference: float, tolerance: float, where="") -> None:
        share = float(difference / tolerance) if tolerance else (math.inf if difference else 0.0)
        self.shares[kind] = max(self.shares.get(kind, 0.0), share)
        assert share <= self.limit, f"{kind} {where}: off by {difference:.3g}, {tolerance:.3g} is allowed"

    def close(self, kind: str, actual, expected, rel: float, abs: float = 0.0, where="") -> None:
        """|actual - expected| <= rel * max|expected| + abs; of a stored subsample, at the same elements."""
        actual = actual.detach().cpu().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
        expected = np.asarray(expected)
        if actual.shape != expected.shape:
            assert expected.ndim == 1 and actual.size >= expected.size, f"{where}: {actual.shape}, {expected.shape}"
            actual = subsample(actual, expected.size)
        difference = np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0)
        scale = np.max(np.abs(expected.astype(np.float64)), initial=0.0)
        self.within(kind, difference, rel * scale + abs, where)


def close(actual, expected, rel: float, abs: float = 0.0, what: str = "") -> None:
    """`Tally.close` on its own."""
    Tally().close("value", actual, expected, rel, abs, what)


VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def filled_vgg16() -> dict[str, torch.Tensor]:
    """The convolutions of torchvision's vgg16 with filled weights, under torchvision's names."""
    shapes = {}
    for i, (before, width) in zip(VGG16_CONVOLUTIONS, itertools.pairwise(VGG16_WIDTHS), strict=True):
        shapes |= {f"features.{i}.weight": (width, before, 3, 3), f"features.{i}.bias": (width,)}
    return filled(shapes)
