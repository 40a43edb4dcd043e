"""benchmarks.sample: FLOPs as counted by hand, and a row whose shares are of one whole."""

import json

import pytest
import torch

from benchmarks import sample


def test_flops_are_those_of_the_formula():
    """Also of the fused attention, and of everything but the embeddings of t and label, for an image."""
    depth, d, n = 6, 192, 16  # SiT-T/2 on 8 x 8 latents
    sit = sample.random_run("SiT-T/2", "f4d4-tiny", 32, torch.device("cpu")).sit
    x, one = torch.randn(1, 4, 8, 8), torch.ones(1)
    block = 2 * n * d * (4 * d + 8 * d) + 4 * n * n * d + 2 * 6 * d * d  # projections and MLP, attention, modulation
    ends = 2 * n * 16 * d + 2 * n * d * 16 + 2 * 2 * d * d  # patches in and out, modulation
    time = 2 * (256 * d + d * d)
    assert sample.count_flops(lambda: sit(x, one, one.long())) == depth * block + ends + time


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SMALL", (("SiT-T/2", "f4d4-tiny", 16),))
    monkeypatch.setattr(sample, "matmul_flops", lambda device, dtype: 1e9)
    options = "--device cpu --threads 1 --batch-sizes 2 --num-steps 2 --precisions fp32,bf16"
    sample.main([*options.split(), "--output", str(tmp_path)])
    (file,) = tmp_path.glob("sample-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["precision"], row["guidance"]) for row in rows] == [(p, g) for p in ("fp32", "bf16") for g in (1, 2.5)]
    for row in rows:
        assert sum(row[f"{part}_percent"] for part in ("sit", "decode", "copy_write")) == pytest.approx(100)
        assert min(value for value in row.values() if isinstance(value, float)) > 0
