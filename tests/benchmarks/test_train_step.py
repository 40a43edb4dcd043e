"""The benchmark of a training step: its parts are those that were counted, and make up the step."""

import pytest
import torch

from benchmarks import train_step

TINY = dict(vae="f4d4-tiny", resolution=32)


@pytest.fixture(autouse=True)
def with_caches():
    """Which `measure` switches off, for a process of its own."""
    yield
    torch.compiler.config.force_disable_caches = False


@pytest.mark.parametrize("script", ["repae", "ldm"])
def test_the_parts_are_those_that_were_counted(script, monkeypatch, tmp_path):
    monkeypatch.setitem(train_step.SIZES, "tiny", (script, TINY, dict(model="SiT-T/2", encoder_depth=2)))
    monkeypatch.setitem(train_step.STEPS, "cpu", (0, 1, 1))
    cpu = torch.device("cpu")
    words = train_step.options("tiny", cpu, small=True, precision="no", compiled=False, more=[])
    whole, parts = train_step.measure("tiny", [*words, "--output-dir", str(tmp_path)], cpu, 1)
    assert whole["images_per_second"] > 0 and whole["mfu"] is None and whole["first_step_s"] > 0
    assert sum(row["share"] for row in parts) == pytest.approx(1)
    of_the_vae = {"VAE encode", "VAE decode", "LPIPS", "discriminator"}
    counted = {row["part"].removesuffix(" backward") for row in parts if row["gflop_an_image"] > 0}
    assert counted == {"dinov2-vit-b", "SiT step"} | (of_the_vae | {"SiT align pass"} if script == "repae" else set())
    assert all(row["ms_of_a_step"] > 0 for row in parts if row["gflop_an_image"] > 0)
