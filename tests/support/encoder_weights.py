"""Public encoder files in every layout, filled by the rule of tests/golden/encoders/README.md, and what tests share."""

import functools
import json
import math
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import encoders
from models.encoder_table import ENCODERS
from tests.support.golden_data import GOLDEN
from utils.errors import InputError

JEPA_REST = ("predictor", "opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
MOCOV3_REST = {"epoch": 300, "arch": "vit", "optimizer": {"state": {}, "param_groups": []}}


@functools.cache
def manifest() -> dict:
    return json.loads((GOLDEN / "encoders/manifest.json").read_text())


@functools.cache
def cases() -> dict:
    return json.loads((GOLDEN / "encoders/cases.json").read_text())


def fill(name: str, shape) -> Tensor:
    """The weight of the key `name` of a public file; another rule than that of tests/golden/fill.py."""
    n = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if name.rsplit(".", 1)[-1] in ("cls_token", "pos_embed"):
        n = np.float32(0.02) * n
    elif len(shape) >= 2:
        n = n * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    elif len(shape) == 1:
        n = 1 + np.float32(0.1) * n if name.endswith("weight") else np.float32(0.05) * n
    else:
        n = np.float32(4.6)
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def images(resolution: int, batch: int = 2) -> Tensor:
    """uint8 (batch, 3, R, R); the golden cases use the batch of two."""
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(b"image")))
    return torch.from_numpy(rng.integers(0, 256, size=(batch, 3, resolution, resolution), dtype=np.uint8))


def public_checkpoint(name: str, depth: int | None = 2) -> dict:
    """What the public file of an encoder holds, in its own layout, with everything that lies beside the encoder.

    Args:
        name: a key of `ENCODERS`.
        depth: 2, or None for the real depth.
    """
    entry = manifest()[name]
    keys = entry["keys_full"] if depth is None else entry["keys_depth2"]
    shapes = tuple((key, tuple(shape)) for key, shape in (keys | entry["distractor_keys"]).items())
    state = dict((_filled.__wrapped__ if depth is None else _filled)(shapes))  # full-size weights are not kept
    if name == "jepa-vit-h":
        rest = dict.fromkeys(JEPA_REST, 0)
        return {"encoder": state, "target_encoder": {key: torch.zeros(()).expand(s) for key, s in keys.items()}, **rest}
    for wrapper in entry["wrap"]:
        state = {wrapper: state}
    return state | MOCOV3_REST if name.startswith("mocov3") else state


@functools.lru_cache(maxsize=2)  # the encoders of one test, for the resolution or the script that comes second
def _filled(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Tensor]:
    return {key: fill(key, shape) for key, shape in shapes}


def write_public_file(name: str, folder: Path, checkpoint: dict | None = None) -> Path:
    """The depth-2 public file on disk in its own format: TorchScript for CLIP, torch's legacy one for MAE, else zip."""
    checkpoint = checkpoint or public_checkpoint(name)
    path = folder / ENCODERS[name].file
    if name == "clip-vit-L":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(_module_tree(checkpoint)).save(path)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=name != "mae-vit-l")
    return path


def _module_tree(state: dict[str, Tensor]) -> nn.Module:
    """A module whose state dict this is."""
    root = nn.Module()
    for key, value in state.items():
        *parents, leaf = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value)
    return root


def use_small_encoders(monkeypatch, depth: int = 2) -> None:
    """Let `load_encoder` build the named encoders at this depth, with filled weights: no file, no network, full width.

    This replaces one function of `models.encoders` for one test; no flag leads here.
    """

    def load_network(spec, resolution, checkpoint=None):
        network = encoders.build(spec, resolution, depth).to_empty(device="cpu")
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in network.state_dict().items())
        network.load_state_dict(_filled(shapes))
        return network

    monkeypatch.setattr(encoders, "load_network", load_network)


def refusal(call, *needles) -> None:
    """Assert that `call()` raises an InputError of one line that holds every needle."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for needle in needles:
        assert str(needle) in message, (needle, message)
