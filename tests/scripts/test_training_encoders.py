"""Training with the public encoders: depth 2 and random weights stand in for their files; layout and sizes are real."""

import pytest

import cache_latents
import train_ldm_only
import train_repae
from models import encoders
from tests.support import small
from tests.support.encoder_weights import use_small_encoders

RESOLUTION = 64  # the least that every patch size and input size divides
SMALL = dict(resolution=RESOLUTION, model="SiT-T/4", batch_size=2)

FAMILIES = ["dinov2-vit-b", "mocov3-vit-b", "clip-vit-L"]  # resize after, not at all, before normalising
ALL = [*encoders.ENCODERS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = small.write_place(tmp_path_factory.mktemp("place64"), count=4, resolution=RESOLUTION)
    cache_latents.main(small.cache_options(place, place.latents, pproc_batch_size=2))
    return place


@pytest.fixture
def two_blocks(monkeypatch):
    use_small_encoders(monkeypatch)


def check_run(script, options, place, tmp_path, enc_type):
    script.main(options(place, tmp_path, "run", **SMALL, max_train_steps=2, enc_type=enc_type))
    rows = small.metrics(tmp_path, "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(-1 <= row["proj_loss"] <= 1 and row["proj_loss"] != 0 for row in rows)
    state = small.checkpoint(tmp_path, "run", 2)["model"]
    widths = [encoders.ENCODERS[name].width for name in enc_type.split(",")]
    assert [state[f"projectors.{i}.4.weight"].shape[0] for i in range(len(widths))] == widths


@pytest.mark.parametrize("enc_type", [*FAMILIES, "dinov2-vit-b,mae-vit-l"])
def test_both_scripts_run_with_it(enc_type, two_blocks, place, tmp_path):
    check_run(train_repae, small.repae_options, place, tmp_path / "repae", enc_type)
    check_run(train_ldm_only, small.ldm_options, place, tmp_path / "ldm", enc_type)


@pytest.mark.slow
@pytest.mark.parametrize("enc_type", ALL)
def test_both_scripts_run_with_every_encoder(enc_type, two_blocks, place, tmp_path):
    check_run(train_repae, small.repae_options, place, tmp_path / "repae", enc_type)
    check_run(train_ldm_only, small.ldm_options, place, tmp_path / "ldm", enc_type)


def test_the_seam_is_out_of_reach_of_the_command_line(place, tmp_path, capsys):
    """Without weights a public encoder is an error, never a random network."""
    with pytest.raises(SystemExit) as stopped:
        train_repae.main(small.repae_options(place, tmp_path, "run", **SMALL, enc_type="mocov3-vit-l"))
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "mocov3_vitl.pth" in error
