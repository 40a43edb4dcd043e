"""What makes a training step cheaper: how much of it still is the same step."""

import json
import time
from pathlib import Path

import pytest
import torch

import train_ldm_only
import train_repae
import train_vae
from configs.arguments import repae_parser
from dataset.data import LatentsAndLabels
from tests.support import small
from training.window import SPEEDS
from utils.parts import Part

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}
NETWORKS = {"train_repae": "vae,sit", "train_ldm_only": "sit", "train_vae": "vae"}
OF_THE_VAE = {"vae_loss", "vae_align_loss", "reconstruction_loss", "d_loss", "grad_norm_vae", "grad_norm_disc"}
OF_THE_VAE |= {"latent_std", "latent_std_ratio", "skipped_steps_vae", "skipped_steps_disc"}


def train(script: str, place, output: Path, name: str, **options) -> None:
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """`plain(script)`: folder and name of an ordinary run of 4 steps; made once."""
    output, made = tmp_path_factory.mktemp("plain"), set()

    def run(script: str) -> tuple[Path, str]:
        if script not in made:
            train(script, place, output, script)
            made.add(script)
        return output, script

    return run


# --vae-every


def test_between_its_steps_the_vae_rests_and_sit_goes_on(place, tmp_path):
    """K = 2: VAE and discriminator learn at steps 0 and 2; the rows of steps 1 and 3 hold no loss of theirs."""
    train("train_repae", place, tmp_path, "run", vae_every=2, checkpointing_steps=1)
    rows = small.metrics(tmp_path, "run")
    for row, learns in zip(rows, (True, False, True, False), strict=True):
        assert OF_THE_VAE & row.keys() == (OF_THE_VAE if learns else set())
        assert {"sit_loss", "denoising_loss", "proj_loss", "grad_norm_sit"} <= row.keys()

    one, two, three = (small.checkpoint(tmp_path, "run", step) for step in (1, 2, 3))
    for entry in ("vae", "discriminator", "opt_vae", "opt_disc"):
        small.assert_same(one[entry], two[entry])
        with pytest.raises(AssertionError):
            small.assert_same(two[entry], three[entry])
    for entry in ("model", "ema", "opt"):
        with pytest.raises(AssertionError):
            small.assert_same(one[entry], two[entry])


def test_a_row_of_several_steps_averages_over_those_that_have_the_loss(place, tmp_path):
    train("train_repae", place, tmp_path, "each", vae_every=2, max_train_steps=3)
    train("train_repae", place, tmp_path, "all", vae_every=2, max_train_steps=3, log_steps=3, checkpointing_steps=3)
    first, second, third = small.metrics(tmp_path, "each")
    (row,) = small.metrics(tmp_path, "all")
    assert row["vae_loss"] == pytest.approx((first["vae_loss"] + third["vae_loss"]) / 2)
    assert row["sit_loss"] == pytest.approx((first["sit_loss"] + second["sit_loss"] + third["sit_loss"]) / 3)


def test_latents_are_those_of_the_vae_that_rests(plain, place, tmp_path):
    """The step after a VAE's update is SiT's alone, on the latents that an ordinary step has: equal loss of SiT."""
    train("train_repae", place, tmp_path, "run", vae_every=4, max_train_steps=2)
    rest, ordinary = small.metrics(tmp_path, "run")[1], small.metrics(*plain("train_repae"))[1]
    for name in ("sit_loss", "denoising_loss", "proj_loss", "grad_norm_sit"):
        assert rest[name] == pytest.approx(ordinary[name], rel=1e-6)


def test_a_resumed_run_keeps_the_vaes_turns(place, tmp_path):
    options = dict(vae_every=3, gradient_accumulation_steps=2)
    train("train_repae", place, tmp_path, "whole", **options)
    train("train_repae", place, tmp_path, "run", max_train_steps=2, **options)
    train("train_repae", place, tmp_path, "run", resume="latest", **options)
    actual, expected = small.checkpoint(tmp_path, "run", 4), small.checkpoint(tmp_path, "whole", 4)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)
    assert small.metrics(tmp_path, "run") == small.metrics(tmp_path, "whole")


# Memory and form


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpointed_activations_change_no_bit(script, plain, place, tmp_path):
    """The backward pass computes the same numbers again: on a CPU to the last bit, with the discriminator's too."""
    train(script, place, tmp_path, "run", grad_checkpoint=NETWORKS[script])
    actual, expected = small.checkpoint(tmp_path, "run", 4), small.checkpoint(*plain(script), 4)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)


@pytest.mark.parametrize("script", ["train_repae", "train_vae"])
def test_tuned_convolutions_are_the_same_up_to_rounding(script, plain, place, tmp_path):
    train(script, place, tmp_path, "run", tune_convolutions=True, max_train_steps=2)
    for row, expected in zip(small.metrics(tmp_path, "run"), small.metrics(*plain(script)), strict=False):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-4)
    weights = small.checkpoint(tmp_path, "run", 2)["vae"]["decoder.conv_in.weight"]
    assert weights.is_contiguous(memory_format=torch.channels_last)


# Compiling


@pytest.fixture
def nothing_compiled():
    """As in a new process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_nothing_is_compiled_again_after_the_first_steps(place, tmp_path, monkeypatch):
    """With previews, checkpoints and resting steps of the VAE between them."""
    graphs = []
    step = train_repae.train_step

    def counted(*args, **options):
        scalars = step(*args, **options)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return scalars

    monkeypatch.setattr(train_repae, "train_step", counted)
    options = dict(max_train_steps=8, vae_every=2, num_preview=2, sampling_steps=3)
    train("train_repae", place, tmp_path, "run", compile=True, **options)
    assert 0 < graphs[0] < graphs[1] == graphs[-1]


# What a run says


def test_a_run_says_how_it_computes(place, tmp_path):
    train("train_repae", place, tmp_path, "run", max_train_steps=1, gradient_accumulation_steps=2)
    (line,) = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if " a step = " in line]
    assert line.endswith("8 images a step = 8 on each of 1, 2 times a step (CPU, 1 threads); float32; not compiled")


def test_every_row_has_the_speeds_and_fp16s_scales(place, tmp_path):
    train("train_repae", place, tmp_path, "run", max_train_steps=2, mixed_precision="fp16")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert set(SPEEDS) - row.keys() == {"mfu"}  # which a CPU has not
        assert row["images_per_second"] > 0 and 0 < row["data_wait_share"] < 1 and 0.1 < row["peak_memory_gib"] < 30
        assert {row[f"loss_scale_{name}"] for name in ("sit", "vae", "disc")} <= {2.0**k for k in range(10, 18)}


def test_the_share_of_waiting_is_the_loaders(place, tmp_path, monkeypatch):
    """A loader that takes as long as ten steps is most of the time."""
    read = LatentsAndLabels.__getitems__

    def slow(self, indices):
        time.sleep(0.5)
        return read(self, indices)

    monkeypatch.setattr(LatentsAndLabels, "__getitems__", slow)
    train("train_ldm_only", place, tmp_path, "run", max_train_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["data_wait_share"] > 0.6 for row in rows)


def test_the_mfu_is_the_counted_flops_over_the_cards_peak(place, tmp_path, monkeypatch):
    peak = 1e9
    for module in ("training.plan", "training.run"):
        monkeypatch.setattr(f"{module}.card_peak", lambda *, half, tf32: peak)
    train("train_repae", place, tmp_path, "run", max_train_steps=1)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    args = repae_parser().parse_args(small.repae_options(place, tmp_path, "plan"))
    flops = train_repae.planned(args).flops_per_image
    assert row["mfu"] == pytest.approx(row["images_per_second"] * flops / peak)


def test_a_resting_vae_costs_its_encoder_alone(place, tmp_path):
    """K = 4: a quarter of all that VAE and discriminator learn with; encoder and SiT as ever."""

    def flops(**options) -> dict:
        args = repae_parser().parse_args(small.repae_options(place, tmp_path, "plan", **options))
        return train_repae.planned(args).flops

    always, seldom = flops(), flops(vae_every=4)
    assert seldom.keys() == always.keys()
    for part, value in always.items():
        kept = (
            1 if part in (Part("VAE encode"), Part("SiT step"), Part("SiT step", True)) or "timm" in part.name else 0.25
        )
        assert seldom[part] == pytest.approx(kept * value), part
