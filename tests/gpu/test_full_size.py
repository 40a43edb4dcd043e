"""The paper's sizes with random weights: losses stay finite; rate, memory and the first step's seconds are written."""

import pytest

from tests.gpu.full_size import train

SIZES = {"f8d4": dict(model="SiT-XL/2", vae="f8d4"), "f16d32": dict(model="SiT-XL/1", vae="f16d32")}
TINY = dict(model="SiT-T/2", vae="f4d4-tiny", resolution=64, enc_type="mocov3-vit-s", encoder_depth=2)


@pytest.mark.usefixtures("leaves_numerics")
def test_full_size_in_small_form(tmp_path, bounded, record_property):
    row, infinite = train(tmp_path, steps=5, warm=2, batch_size=2, mixed_precision="bf16", compile=False, **TINY)
    record_property("rate", row)
    bounded("share of steps with an infinite loss", infinite, 0)
    assert row["images_per_second"] > 0 and row["first_step_s"] > 0 and row["peak_gib"] > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("leaves_numerics")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
def test_full_size(size, precision, compiled, tmp_path, bounded, record_property):
    how = dict(mixed_precision=precision, compile=compiled, batch_size=32, enc_type="dinov2-vit-b")
    row, infinite = train(tmp_path, steps=200 if compiled else 50, warm=10, **SIZES[size], **how)
    record_property("rate", row)
    bounded("share of steps with an infinite loss", infinite, 0)
