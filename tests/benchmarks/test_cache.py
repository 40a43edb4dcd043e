"""benchmarks.cache: a slow disk is waited for where nothing is encoded meanwhile."""

import contextlib
import json

import pytest
import torch

import cache_latents
from benchmarks import cache


@contextlib.contextmanager
def in_turn(items):
    """`utils.background.ahead` without its thread."""
    yield iter(items)


@pytest.mark.parametrize(("ahead", "waited"), [(cache_latents.ahead, (-50, 60)), (in_turn, (60, 200))])
def test_a_slow_disk(tmp_path, monkeypatch, ahead, waited):
    """Encoding is made to take 50 ms, a small part of it work."""
    monkeypatch.setattr(cache_latents, "ahead", ahead)
    monkeypatch.setattr(cache, "FORMATS", {"channels_last": torch.channels_last})
    monkeypatch.setattr(cache, "matmul_flops", lambda device, dtype: 1e9)
    for module in (cache, cache_latents):
        monkeypatch.setattr(module, "encode_moments", slowed(module.encode_moments))
    options = "--device cpu --threads 1 --vaes f4d4-tiny --resolution 8 --batch-size 1 --batches 6 --repeats 2"
    cache.main([*options.split(), "--output", str(tmp_path)])
    (file,) = tmp_path.glob("cache-*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["layout"] == "channels_last" and waited[0] < row["waited_percent"] < waited[1]


def slowed(encode):
    def slow(vae, pixels):
        cache.time.sleep(0.05)
        return encode(vae, pixels)

    return slow
