"""generate.py's options, the checkpoints that it reads, and bad input."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from configs.arguments import generate_parser
from sampling import generation
from sampling.generation import decode_latents
from sampling.trained import load_trained
from tests.support.evaluation_data import samples_file
from tests.support.sampling import BATCH, COUNT, SIDE, difference, draw, flags, record_calls, refused

# Options


@pytest.mark.parametrize(
    ("options", "nfe", "doubled"),
    [
        (dict(), 3, 3),
        (dict(heun=True), 5, 5),
        (dict(mode="sde"), 3, 3),
        (dict(cfg_scale=1.0), 3, 0),
        (dict(guidance_low=0.5, guidance_high=0.9), 3, 1),
    ],
)
def test_nfe_is_what_was_evaluated(exps, tmp_path, monkeypatch, options, nfe, doubled):
    calls = record_calls(monkeypatch)
    job = draw(exps, tmp_path, num_fid_samples=BATCH, **options)
    assert job.record["nfe"] == len(calls) == nfe and calls.count(2 * BATCH) == doubled
    assert job.record["sampler"]["num_steps"] == 3


def test_no_ema_samples_the_raw_weights(exps, tmp_path):
    ema, raw = draw(exps, tmp_path / "ema"), draw(exps, tmp_path / "raw", ema=False)
    assert (difference(ema.images, raw.images).max(axis=(1, 2, 3)) > 5).all() and raw.npz.stem.endswith("no-ema")
    assert np.array_equal(raw.images, draw(exps, tmp_path / "swapped", "swapped").images)


@pytest.mark.parametrize(("precision", "apart"), [("bf16", 3), ("fp16", 1)])
def test_half_precision_is_near(exps, tmp_path, precision, apart):
    full = draw(exps, tmp_path / "fp32", precision="fp32")
    half = draw(exps, tmp_path / precision, precision=precision)
    assert half.record["sampler"]["precision"] == precision and precision in half.npz.stem
    assert 0 < difference(full.images, half.images).mean() < apart


def test_precision_flags_set_tf32(exps, tmp_path):
    for i, (options, allowed) in enumerate(
        [
            (dict(), True),
            (dict(tf32=False), False),
            (dict(precision="fp32"), False),
            (dict(precision="bf16"), True),
            (dict(precision="tf32", tf32=False), True),
            (dict(precision="fp16", tf32=False), False),
        ]
    ):
        job = draw(exps, tmp_path / str(i), num_fid_samples=1, pproc_batch_size=1, num_steps=1, **options)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert job.record["tf32"] == allowed


def test_pictures_show_the_samples_of_the_file(exps, tmp_path):
    job = draw(exps, tmp_path, num_fid_samples=10, save_png=True, grid="2x3", trajectory=True, num_steps=12)
    pictures = sorted(path.name for path in job.npz.with_suffix("").iterdir())
    assert pictures == [f"{i:06d}.png" for i in range(10)]
    assert np.array_equal(np.asarray(Image.open(job.npz.with_suffix("") / "000009.png")), job.images[9])
    sheet = np.asarray(Image.open(job.npz.with_suffix(".png")))
    assert sheet.shape == (2 * SIDE, 3 * SIDE, 3)
    for i in range(6):
        assert np.array_equal(cell(sheet, i // 3, i % 3), job.images[i])


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    return sheet[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (dict(num_steps=12), 9),
        (dict(num_steps=12, heun=True), 9),
        (dict(num_steps=3, mode="sde"), 4),
        (dict(num_steps=1), 2),
    ],
)
def test_trajectory_leads_from_the_noise_to_the_sample(exps, tmp_path, options, frames):
    job = draw(exps, tmp_path, num_fid_samples=10, trajectory=True, **options)
    sheet = np.asarray(Image.open(job.folder / f"{job.npz.stem}-trajectory.png"))
    assert sheet.shape == (8 * SIDE, frames * SIDE, 3)
    trained = load_trained(exps / "repae")
    noise = generation.sample_normal(0, "noise", range(BATCH), (4, 6, 6))
    first = decode_latents(trained.vae, noise, *trained.latent_stats).permute(0, 2, 3, 1).numpy()
    for i in range(8):
        assert np.array_equal(cell(sheet, i, 0), first[i])
        assert np.array_equal(cell(sheet, i, frames - 1), job.images[i])
        # Closer to the sample from frame to frame, as the ODE is nearly straight.
        distances = [difference(cell(sheet, i, frame), job.images[i]).mean() for frame in range(frames)]
        if "mode" not in options:
            assert distances == sorted(distances, reverse=True)


def test_the_default_name_is_the_contracts():
    args = generate_parser().parse_args(["--exp-path", "exps/my-run"])
    assert generate.output_name(args, SimpleNamespace(name="my-run", step=400000)) == "my-run_0400000_cfg1.5-0.0-1.0"


@pytest.mark.slow
def test_compiled_samples_are_near_and_reproducible(exps, tmp_path):
    options = dict(guidance_low=0.5, guidance_high=0.9, trajectory=True)
    eager, compiled = draw(exps, tmp_path / "a", **options), draw(exps, tmp_path / "b", compile=True, **options)
    apart = difference(eager.images, compiled.images)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-2
    again = draw(exps, tmp_path / "c", compile=True, **options)
    assert np.array_equal(again.images, compiled.images)


# Checkpoints


def test_a_public_checkpoint_needs_no_encoder(exps, tmp_path, monkeypatch):
    """Namespace args, LDM keys, no architecture of the VAE: the samples are those of the same weights in our form."""
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("a network of timm was made"))
    assert np.array_equal(draw(exps, tmp_path / "a", "public").images, draw(exps, tmp_path / "b").images)


# Bad input


@pytest.mark.parametrize(
    ("run", "options", "needed"),
    [
        ("repae", dict(num_steps=0), ["--num-steps", "'0'", ">= 1"]),
        ("repae", dict(num_steps=1, mode="sde"), ["--num-steps: 1 was given", "at least 2"]),
        ("repae", dict(mode="sde", heun=True), ["--heun", "--mode sde"]),
        ("cosine", dict(mode="sde"), ["--path-type: linear was given", "trained with cosine"]),
        ("repae", dict(guidance_low=0.5, guidance_high=0.5), ["--guidance-low: 0.5 was given", "-high (0.5)"]),
        ("repae", dict(grid="8"), ["--grid", "'8'", "8x8"]),
        ("repae", dict(train_steps="last"), ["--train-steps: 'last' was given"]),
        ("repae", dict(train_steps="8"), ["--train-steps", "0000008.pt does not exist", "there: 0000007"]),
        ("plain", dict(), ["--cfg-scale: 1.5 was given; 1 is needed"]),
        ("repae", dict(vae_ckpt="{folder}/none.pt"), ["--vae-ckpt: {folder}/none.pt does not exist"]),
        ("repae", dict(classes="3,10"), ["--classes: class 10 was asked for; this model has classes 0..9"]),
        ("repae", dict(classes="3;4"), ["--classes: '3;4' was given", "between commas"]),
        ("repae", dict(classes="7,2,7"), ["--classes: 7,2,7 names a class twice"]),
        ("repae", dict(classes=""), ["--classes: '' was given"]),
        ("repae", dict(classes="3", num_classes=4), ["--num-classes and --classes were both given"]),
        ("repae", dict(label_sampling="equal", num_fid_samples=21), ["--label-sampling equal: 21 samples"]),
        ("repae", dict(num_classes=11), ["--num-classes: class 10 was asked for"]),
        ("repae", dict(label_file="{folder}/none.txt"), ["--label-file: {folder}/none.txt cannot be read"]),
        ("repae", dict(label_file="{folder}/words.txt"), ["--label-file: {folder}/words.txt cannot be read"]),
        ("repae", dict(label_file="{folder}/empty.txt"), ["--label-file: {folder}/empty.txt", "at least 20"]),
        ("repae", dict(label_file="{folder}/short.npy"), ["--label-file: {folder}/short.npy", "(19,)", "at least 20"]),
        ("repae", dict(label_file="{folder}/real.npy"), ["--label-file: {folder}/real.npy", "float64"]),
        ("repae", dict(label_file="{folder}/pickled.npy"), ["{folder}/pickled.npy: damaged or not a .npy array"]),
        ("repae", dict(label_file="{folder}/high.npy"), ["--label-file: class 10 was asked for"]),
        ("repae", dict(label_file="{folder}/low.npy"), ["--label-file: {folder}/low.npy", ">= 0"]),
        ("repae", dict(label_file="{folder}/high.npy", label_sampling="equal"), ["--label-sampling equal"]),
        ("repae", dict(sample_dir="{folder}/short.npy"), ["--sample-dir: {folder}/short.npy is no folder"]),
        ("repae", dict(evaluate="{folder}/none.npz"), ["--evaluate: {folder}/none.npz does not exist"]),
        ("repae", dict(evaluate="{folder}/other.npz"), ["--evaluate: {folder}/other.npz has 8 x 8", "24 x 24"]),
        ("repae", dict(evaluate="{folder}/same.npz", features="vgg"), ["--features: 'vgg' was given"]),
        ("repae", dict(evaluate="{folder}/same.npz", num_fid_samples=3), ["--num-fid-samples: 3 was given"]),
        ("repae", dict(evaluate="{folder}/same.npz", enc_ckpt="x.pt"), ["--enc-ckpt was given, but --features incep"]),
        ("repae", dict(evaluate="{folder}/same.npz", inception_weights="{folder}/none.pth"), ["--inception-weights"]),
        ("repae", dict(features="dinov2-vit-l"), ["--features goes with --evaluate"]),
        ("repae", dict(inception_weights="x.pth"), ["--inception-weights goes with --evaluate"]),
    ],
)
def test_bad_options_are_one_line_and_touch_nothing(exps, bad, capsys, run, options, needed):
    options = {key: value.format(folder=bad) if isinstance(value, str) else value for key, value in options.items()}
    line = refused(flags(exps, bad / "new", run, **options), capsys, exps, bad)
    for part in needed:
        assert part.format(folder=bad) in line, (part, line)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "words.txt").write_text("cat dog")
    (folder / "empty.txt").touch()
    good = np.zeros(COUNT, np.int64)
    lists = {"short": good[:-1], "real": good + 0.5, "high": good + 10, "low": good - 1, "pickled": np.array([{}])}
    for name, labels in lists.items():
        np.save(folder / f"{name}.npy", labels, allow_pickle=True)
    samples_file(folder / "other.npz", 10, 8, 0)
    samples_file(folder / "same.npz", 10, SIDE, 0)
    return folder


def test_the_path_does_not_matter_along_the_ode(exps, tmp_path):
    job = draw(exps, tmp_path, "cosine", num_fid_samples=BATCH)
    assert job.record["sampler"]["path_type"] == "cosine"


def test_samples_that_are_not_finite_are_refused(exps, tmp_path, capsys):
    contents = torch.load(exps / "repae" / "checkpoints" / "0000007.pt")
    contents["ema"]["final_layer.linear.bias"][0] = float("inf")
    (tmp_path / "exp" / "checkpoints").mkdir(parents=True)
    torch.save(contents, tmp_path / "exp" / "checkpoints" / "0000009.pt")
    with pytest.raises(SystemExit):
        generate.main(flags(tmp_path, tmp_path / "s", "exp"))
    assert "0000009.pt gives samples that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "s").glob("*.npz"))
