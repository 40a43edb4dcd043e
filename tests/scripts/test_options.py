"""Runs with the options of docs/options.md, as wholes: they learn, and go on bit for bit where they were stopped."""

import pytest

import train_ldm_only
import train_repae
from tests.support import small

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only}
EVERY = dict(cosine_coeff=0.5)  # all that goes together


def train(script, place, output, name="run", **options):
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))
    return output / name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_every_option_resumes(script, place, tmp_path):
    train(script, place, tmp_path, "whole", **EVERY)
    train(script, place, tmp_path, **EVERY | dict(max_train_steps=2))
    train(script, place, tmp_path, **EVERY, resume="latest")
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"))
    for row in small.metrics(tmp_path, "whole"):
        terms = row["denoising_loss"] + 0.5 * row["proj_loss"] + 0.5 * row["cosine_loss"]
        assert row["sit_loss"] == pytest.approx(terms, rel=1e-5) and row["cosine_loss"] > 0
