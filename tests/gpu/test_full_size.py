"""The paper's sizes with random weights: losses stay finite; rate, memory and the first step's seconds are written."""

import gc

import pytest
import torch

from tests.gpu.full_size import train_apart

SIZES = {"f8d4": dict(model="SiT-XL/2", vae="f8d4"), "f16d32": dict(model="SiT-XL/1", vae="f16d32")}
TINY = dict(model="SiT-T/2", vae="f4d4-tiny", resolution=64, enc_type="mocov3-vit-s", encoder_depth=2)
LENGTH = dict(warm=10, seconds=100)  # or 200 steps, 50 of them eager: eight cases and their compiling are 20 minutes


def batch_size() -> int:
    """32, the share of eight cards; fewer where --dry-run's count of f8d4, 12 GiB and 2 GiB an image, is no less."""
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, min(32, int((gib - 12) / 2)))


def test_full_size_in_small_form(tmp_path, bounded, record_property):
    """Time is up after the first step that counts."""
    how = dict(batch_size=2, mixed_precision="bf16", compile=False, grad_checkpoint="vae", **TINY)
    row, infinite = train_apart(output_dir=tmp_path, steps=6, warm=3, seconds=0, **how)
    record_property("rate", row)
    bounded("share of steps with an infinite loss", infinite, 0)
    assert row["steps"] == 4 and row["grad_checkpoint"] == "vae"
    assert row["images_per_second"] > 0 and row["first_step_s"] > 0 and row["peak_gib"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
def test_full_size(size, precision, compiled, tmp_path, bounded, record_property):
    """Eager f8d4 with checkpointed activations: at batch 32 the others are 76 of an H100's 78 GiB, by --dry-run."""
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests held
    how = dict(mixed_precision=precision, compile=compiled, batch_size=batch_size(), enc_type="dinov2-vit-b")
    how |= dict(grad_checkpoint="vae") if size == "f8d4" and not compiled else {}
    row, infinite = train_apart(output_dir=tmp_path, steps=200 if compiled else 50, **LENGTH, **SIZES[size], **how)
    record_property("rate", row)
    bounded("share of steps with an infinite loss", infinite, 0)
