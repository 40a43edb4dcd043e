"""Runs with the options of docs/options.md, as wholes: they learn, and go on bit for bit where they were stopped."""

import shutil

import pytest
import torch

import generate
import train_ldm_only
import train_repae
import train_vae
from models.encoders import Encoder
from sampling.trained import load_trained
from tests.support import sampling, small

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}
RATES = dict(warmup_steps=2, lr_schedule="cosine", lr_final=0.1)
# All that goes together.
OF_SIT = dict(cosine_coeff=0.5, weighting="logit-normal", time_shift="auto", projector="conv3", spatial_norm=0.6)
EVERY = {"train_repae": OF_SIT | RATES, "train_ldm_only": OF_SIT | RATES, "train_vae": RATES}


def train(script, place, output, name="run", **options):
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))
    return output / name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_every_option_resumes(script, place, tmp_path):
    """From step 2, as after a crash: the schedule is that of a run of 4 steps."""
    whole = train(script, place, tmp_path, "whole", **EVERY[script])
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0000004.pt").unlink()
    train(script, place, tmp_path, **EVERY[script], resume="latest")
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"))

    rows = small.metrics(tmp_path, "whole")
    assert [row["lr"] for row in rows] == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.55e-4])
    if script != "train_vae":
        for row in rows:
            terms = row["denoising_loss"] + 0.5 * row["proj_loss"] + 0.5 * row["cosine_loss"]
            assert row["sit_loss"] == pytest.approx(terms, rel=1e-5) and row["cosine_loss"] > 0
        assert load_trained(whole).sit.projectors[0].projection_layer.kernel_size == (3, 3)
        assert (whole / "log.txt").read_text().count("--time-shift auto: 0.1875, by latents of 4 x 6 x 6") == 1


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_repae", dict(qk_norm=True)),
        ("train_ldm_only", dict(grad_checkpoint="sit")),
        ("train_ldm_only", dict(model="LightningDiT-T/1", enc_type="None", proj_coeff=0)),
    ],
    ids=["repae", "ldm", "ldm-without-encoder"],
)
def test_lightningdit_trains_resumes_and_is_sampled(script, options, place, tmp_path, capsys):
    options = dict(model="LightningDiT-T/2") | options
    SCRIPTS[script].main(small.OPTIONS[script](place, tmp_path, "run", dry_run=1, **options))
    assert "SiT step" in capsys.readouterr().out
    whole = train(script, place, tmp_path, "whole", **options)
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0000004.pt").unlink()
    train(script, place, tmp_path, **options, resume="latest")
    small.assert_same_training(tmp_path, "run", (tmp_path, "whole"))

    weights = small.checkpoint(tmp_path, "whole", 4)
    for key in ("freqs_cos", "freqs_sin"):
        assert torch.equal(weights["ema"][f"feat_rope.{key}"], weights["model"][f"feat_rope.{key}"])
    sit = load_trained(whole).sit
    assert sit.feat_rope is not None and sit.blocks[0].attn.num_heads == 3
    sampled = sampling.draw(tmp_path, tmp_path / "samples", "whole", num_fid_samples=2)
    assert sampled.images.shape == (2, small.RESOLUTION, small.RESOLUTION, 3) and sampled.record["notes"] == []


def test_alignment_ends_where_proj_until_says(place, tmp_path, monkeypatch):
    """The encoder rests from then on, and no gradient comes from it: the trunk is that of a run with coefficient 0."""
    seen, forward = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda encoder, images: (seen.append(1), forward(encoder, images))[1])
    train("train_ldm_only", place, tmp_path, proj_until=2)
    rows = small.metrics(tmp_path, "run")
    assert len(seen) == 2 and [row["proj_loss"] == 0 for row in rows] == [False, False, True, True]
    assert all(row["sit_loss"] == row["denoising_loss"] for row in rows[2:])
    train("train_ldm_only", place, tmp_path, "on", proj_coeff=0, resume_step=2, continue_train_exp_dir=tmp_path / "run")
    ended, without = (small.checkpoint(tmp_path, name, 4)["model"] for name in ("run", "on"))
    for key in ended:
        assert key.startswith("projectors.") or torch.equal(ended[key], without[key]), key

    sit = load_trained(tmp_path / "run").sit.requires_grad_()
    train_ldm_only.no_alignment(sit).backward()  # several processes wait for every gradient
    assert all(parameter.grad is not None for parameter in sit.projectors.parameters())


def test_what_goes_with_alignment_is_refused_without_it(place, tmp_path, capsys):
    plain = dict(enc_type="None", proj_coeff=0)
    for script, options, said in (
        ("train_repae", dict(proj_until=2), "here the VAE learns by the alignment to the end"),
        ("train_ldm_only", dict(proj_until=2) | plain, "--proj-until: 2 was given; it goes with an encoder"),
        ("train_ldm_only", dict(spatial_norm=0) | plain, "--spatial-norm: 0.0 was given; it goes with an encoder"),
        ("train_ldm_only", dict(projector="conv1") | plain, "--projector: conv1 was given; it goes with an encoder"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            train(script, place, tmp_path, "refused", **options)
        assert said in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_samples_along_shifted_times(exps, tmp_path):
    plain = sampling.draw(exps, tmp_path / "a")
    shifted = sampling.draw(exps, tmp_path / "b", time_shift="auto")
    assert "_shiftauto_" in shifted.npz.stem and "shift" not in plain.npz.stem
    assert shifted.record["sampler"]["time_shift"] == 0.1875  # sqrt(4 * 6 * 6 / 4096)
    assert shifted.record["notes"] == ["--time-shift auto: 0.1875, by latents of 4 x 6 x 6"]
    assert sampling.difference(shifted.images, plain.images).max() > 10
    same = sampling.draw(exps, tmp_path / "c", time_shift=0.1875)
    assert (same.images == shifted.images).all() and same.record["notes"] == []


def test_samples_guided_in_some_channels(exps, tmp_path, capsys):
    some = sampling.draw(exps, tmp_path / "a", guidance_channels=3)
    every = sampling.draw(exps, tmp_path / "b", guidance_channels=4)
    plain = sampling.draw(exps, tmp_path / "c")
    assert "_channels3_" in some.npz.stem and (every.images == plain.images).all()
    assert sampling.difference(some.images, plain.images).max() > 3
    said = sampling.refused(sampling.flags(exps, tmp_path / "d", guidance_channels=5), capsys)
    assert "--guidance-channels: 5 was given; the latents have 4" in said


def test_samples_guided_by_a_weaker_run(exps, tmp_path, capsys):
    """A network that guides itself changes nothing, and neither does one whose interval holds no step."""
    options = dict(guide_exp_path=exps / "swapped", cfg_scale=2.5)
    guided = sampling.draw(exps, tmp_path / "a", **options)
    assert guided.npz.stem.endswith("_guide-swapped_0000007")
    assert guided.record["guide"] == str(exps / "swapped" / "checkpoints" / "0000007.pt")
    assert guided.record["sha256"].keys() >= {"guide", "checkpoint"}
    one = sampling.draw(exps, tmp_path / "b", cfg_scale=1)
    itself = sampling.draw(exps, tmp_path / "c", **options | dict(guide_exp_path=exps / "repae"))
    assert sampling.difference(itself.images, one.images).max() <= 1
    assert sampling.difference(guided.images, one.images).max() > 10
    late = sampling.draw(exps, tmp_path / "d", **options, guidance_high=0.1)
    assert (late.images == one.images).all()
    # A model without a null label is guided so, too.
    sampling.draw(exps, tmp_path / "e", "plain", guide_exp_path=exps / "repae", num_fid_samples=4)

    generate.main(sampling.flags(exps, tmp_path / "f", **options, dry_run=1))
    plan = capsys.readouterr().out
    assert "SiT, guiding" in plan and "3 evaluations of SiT a sample, 3 of them guided" in plan


def test_guides_that_cannot_be_meant_are_refused(exps, tmp_path, capsys):
    other = torch.load(exps / "repae" / "checkpoints" / "0000007.pt", weights_only=True)
    other["vae"] = {key: x + 1 if key == "decoder.conv_out.bias" else x for key, x in other["vae"].items()}
    torch.save(other, tmp_path / "other.pt")
    for run, options, said in (
        ("repae", dict(guide_exp_path=tmp_path / "other.pt"), "other.pt has another VAE than"),
        ("repae", dict(guide_exp_path=exps / "cosine", vae_ckpt=exps / "vae" / "vae.pt"), "has path type cosine"),
        ("repae", dict(guide_exp_path=exps / "none"), "--guide-exp-path: "),
        ("repae", dict(guide_exp_path=exps / "repae", guide_train_steps=8), "--guide-train-steps: "),
        ("repae", dict(guide_exp_path=exps / "repae", cfg_scale=1), "--cfg-scale 1 switches guidance off"),
        ("repae", dict(guidance_channels=2, cfg_scale=1), "--cfg-scale 1 switches guidance off"),
        ("repae", dict(guide_train_steps=7), "--guide-train-steps goes with --guide-exp-path"),
    ):
        assert said in sampling.refused(sampling.flags(exps, tmp_path / "x", run, **options), capsys), said
