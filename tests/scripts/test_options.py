"""Runs with the options of docs/options.md, as wholes: they learn, and go on bit for bit where they were stopped."""

import pytest

import train_ldm_only
import train_repae
from tests.support import sampling, small

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only}
# All that goes together.
EVERY = dict(cosine_coeff=0.5, weighting="logit-normal", time_shift="auto")


def train(script, place, output, name="run", **options):
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))
    return output / name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_every_option_resumes(script, place, tmp_path):
    train(script, place, tmp_path, "whole", **EVERY)
    train(script, place, tmp_path, **EVERY | dict(max_train_steps=2))
    train(script, place, tmp_path, **EVERY, resume="latest")
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"))
    assert (tmp_path / "whole" / "log.txt").read_text().count("--time-shift auto: 0.1875, by latents of 4 x 6 x 6") == 1
    for row in small.metrics(tmp_path, "whole"):
        terms = row["denoising_loss"] + 0.5 * row["proj_loss"] + 0.5 * row["cosine_loss"]
        assert row["sit_loss"] == pytest.approx(terms, rel=1e-5) and row["cosine_loss"] > 0


def test_samples_along_shifted_times(exps, tmp_path):
    plain = sampling.draw(exps, tmp_path / "a")
    shifted = sampling.draw(exps, tmp_path / "b", time_shift="auto")
    assert "_shiftauto_" in shifted.npz.stem and "shift" not in plain.npz.stem
    assert shifted.record["sampler"]["time_shift"] == 0.1875  # sqrt(4 * 6 * 6 / 4096)
    assert shifted.record["notes"] == ["--time-shift auto: 0.1875, by latents of 4 x 6 x 6"]
    assert sampling.difference(shifted.images, plain.images).max() > 10
    same = sampling.draw(exps, tmp_path / "c", time_shift=0.1875)
    assert (same.images == shifted.images).all() and same.record["notes"] == []
