"""The training scripts as wholes, on one process: resumed runs, what a run writes, and what must not change it."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_ldm_only
import train_repae
import train_vae
from dataset.data import ImageData
from models.vae import build_vae
from models.vae_keys import to_ldm
from tests.support import small
from tests.support.forks import Fork

PLAIN = dict(enc_type="None", proj_coeff=0)  # SiT without an encoder
SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}


def train(script: str, place, output: Path, name: str, **options) -> None:
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """`whole(script, **options)`: folder and name of a run of 4 steps that nothing interrupted; made once."""
    output, made = tmp_path_factory.mktemp("whole"), set()

    def run(script: str, **options) -> tuple[Path, str]:
        name = "-".join([script, *(f"{key}-{value}" for key, value in options.items())])
        if name not in made:
            train(script, place, output, name, **options)
            made.add(name)
        return output, name

    return run


@pytest.mark.parametrize(
    ("script", "micro_steps"),
    [("train_repae", 2), ("train_ldm_only", 1), ("train_ldm_only", 2), ("train_vae", 1), ("train_vae", 2)],
)
def test_resumed_equals_uninterrupted(script, micro_steps, whole, place, tmp_path):
    """Over an epoch's end, with LeCam's running means and all moments; bit for bit."""
    options = {"gradient_accumulation_steps": micro_steps}
    reference = whole(script, **options)
    train(script, place, tmp_path, "run", max_train_steps=2, **options)
    half = small.checkpoint(tmp_path, "run", 2)
    train(script, place, tmp_path, "run", resume="latest", **options)
    small.assert_same_training(tmp_path, "run", reference)

    end = small.checkpoint(tmp_path, "run", 4)
    for key in end.keys() - {"args", "vae_config", "scalers", "param_names", "format"}:  # what learning must move
        with pytest.raises(AssertionError):
            small.assert_same(half[key], end[key])
    if script == "train_vae":
        for file in ("run.pt", "run-latents-stats.pt", "run-discriminator-ckpt.pt"):
            state = torch.load(tmp_path / "run" / file)
            small.assert_same(state, torch.load(reference[0] / reference[1] / file.replace("run", reference[1], 1)))


def test_a_killed_run_goes_on(whole, place, tmp_path):
    """Killed while it writes checkpoint 3 and a row of metrics: it goes on from checkpoint 2, and nothing is left."""
    arguments = small.repae_options(place, tmp_path, "run", checkpointing_steps=1)
    job = Fork("tests/support/workers/killed.py", "train_repae", *arguments).wait()
    assert job.returncode == -signal.SIGKILL, job.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name[:10] for path in checkpoints.iterdir()} == {"0000001.pt", "0000002.pt", "0000003.pt"}
    assert not (checkpoints / "0000003.pt").exists()

    train("train_repae", place, tmp_path, "run", checkpointing_steps=2, resume="latest")
    small.assert_same_training(tmp_path, "run", whole("train_repae", gradient_accumulation_steps=1))
    assert {path.name for path in checkpoints.iterdir()} == {"0000001.pt", "0000002.pt", "0000004.pt"}


def test_a_run_goes_on_from_another_folder(whole, place, tmp_path):
    """`--resume-step N --continue-train-exp-dir D`, the public way: D stays as it is, the new folder gets the rest."""
    output, name = whole("train_ldm_only", gradient_accumulation_steps=1)
    before = small.listing(output / name)
    train("train_ldm_only", place, tmp_path, "new", resume_step=2, continue_train_exp_dir=output / name)
    assert small.listing(output / name) == before
    actual, expected = small.checkpoint(tmp_path, "new", 4), small.checkpoint(output, name, 4)
    assert actual.pop("args") and expected.pop("args")
    small.assert_same(actual, expected)
    assert small.metrics(tmp_path, "new") == small.metrics(output, name)[2:]


def test_resuming_by_another_path_is_not_overwriting(whole, place, tmp_path, monkeypatch):
    """The run's own folder, named otherwise: `--overwrite` must not delete what is being resumed."""
    output, name = whole("train_ldm_only", gradient_accumulation_steps=1)
    shutil.copytree(output / name, tmp_path / name)
    before = small.listing(tmp_path / name / "checkpoints")
    monkeypatch.chdir(tmp_path)
    train("train_ldm_only", place, Path(), name, resume_step=4, continue_train_exp_dir=tmp_path / name, overwrite=True)
    assert small.listing(tmp_path / name / "checkpoints") == before


def test_overwrite_replaces_the_run_and_nothing_else(whole, place, tmp_path):
    output, name = whole("train_ldm_only", gradient_accumulation_steps=1)
    shutil.copytree(output / name, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train("train_ldm_only", place, tmp_path, "run", max_train_steps=2, overwrite=True)
    run = tmp_path / "run"
    names = {"args.json", "checkpoints", "log.txt", "metrics.jsonl", "notes.txt"}
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0000002.pt"]
    assert small.metrics(tmp_path, "run") == small.metrics(output, name)[:2]


def test_overwrite_leaves_a_logging_dir_elsewhere_alone(place, tmp_path):
    """A folder for all runs; `..`, and the run's folder itself, are no folder inside it either."""
    for logs in (tmp_path / "all", "..", "."):
        for _ in range(2):
            options = dict(logging_dir=logs, report_to="tensorboard", overwrite=True, max_train_steps=1)
            train("train_ldm_only", place, tmp_path / "exps", "run", **options, **PLAIN)
            (tmp_path / "exps" / "other").mkdir(exist_ok=True)
            (tmp_path / "all").mkdir(exist_ok=True)
            (tmp_path / "all" / "mine.txt").touch()
    assert (tmp_path / "exps" / "other").is_dir() and (tmp_path / "all" / "mine.txt").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_previews_do_not_touch_training(script, whole, place, tmp_path, few_steps):
    train(script, place, tmp_path, "run", num_preview=4, sampling_steps=2, gradient_accumulation_steps=1)
    small.assert_same_training(tmp_path, "run", whole(script, gradient_accumulation_steps=1))
    both = ("samples", "reconstructions")
    kinds = {"train_repae": both, "train_ldm_only": both[:1], "train_vae": both[1:]}[script]
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in pictures] == sorted(f"{step:07d}-{kind}.png" for step in (2, 4) for kind in kinds)
    for path in pictures:  # one row of 8 cells, 4 of them filled
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (small.RESOLUTION, 8 * small.RESOLUTION, 3)
        assert pixels[:, : 4 * small.RESOLUTION].std() > 0 and not pixels[:, 4 * small.RESOLUTION :].any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_near_float32(precision, place, tmp_path, whole):
    """fp16 computes in fp16 on a CPU too, with the scalers that it has on CUDA; that it is slow there is said."""
    for script in SCRIPTS:
        train(script, place, tmp_path, script, mixed_precision=precision, max_train_steps=2)
        exact = small.metrics(*whole(script, gradient_accumulation_steps=1))
        for row, other in zip(small.metrics(tmp_path, script), exact[:2], strict=True):
            loss = "vae_loss" if script == "train_vae" else "sit_loss"
            assert row[loss] != other[loss] and row[loss] == pytest.approx(other[loss], rel=0.05)
        scalers = small.checkpoint(tmp_path, script, 2)["scalers"]
        assert scalers and all(("scale" in state) == (precision == "fp16") for state in scalers.values())
        assert ("slow on a CPU" in (tmp_path / script / "log.txt").read_text()) == (precision == "fp16")


def test_plain_sit_reads_no_image_and_loads_no_encoder(place, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("not needed without alignment")

    monkeypatch.setattr(ImageData, "__getitems__", refuse)
    monkeypatch.setattr("models.encoders.load_encoder", refuse)
    train("train_ldm_only", place, tmp_path, "run", enc_type="None", proj_coeff=0, max_train_steps=2)
    rows = small.metrics(tmp_path, "run")
    assert all(row["sit_loss"] == row["denoising_loss"] and row["proj_loss"] == 0 for row in rows)
    assert not [key for key in small.checkpoint(tmp_path, "run", 2)["model"] if key.startswith("projectors")]


def test_a_row_averages_the_steps_since_the_last(whole, place, tmp_path):
    train("train_ldm_only", place, tmp_path, "run", log_steps=3, checkpointing_steps=4)
    each = small.metrics(*whole("train_ldm_only", gradient_accumulation_steps=1))
    rows = small.metrics(tmp_path, "run")
    assert [row["step"] for row in rows] == [3, 4]
    scalars = ["sit_loss", "denoising_loss", "proj_loss", "grad_norm_sit", "skipped_steps_sit"]
    assert list(each[0]) == ["step", *scalars]
    for name in each[0].keys() - {"step"}:
        assert rows[0][name] == pytest.approx(np.mean([row[name] for row in each[:3]]), rel=1e-6)
        assert rows[1][name] == each[3][name]


def test_a_row_ends_with_a_checkpoint_too(whole, place, tmp_path):
    """So a resumed run, which starts at a checkpoint, writes the rows of an uninterrupted one."""
    train("train_ldm_only", place, tmp_path, "run", log_steps=3, checkpointing_steps=2)
    each = small.metrics(*whole("train_ldm_only", gradient_accumulation_steps=1))
    rows = small.metrics(tmp_path, "run")
    assert [row["step"] for row in rows] == [2, 3, 4]
    for name in each[0].keys() - {"step"}:
        assert rows[0][name] == pytest.approx(np.mean([row[name] for row in each[:2]]), rel=1e-6)
        assert rows[1][name] == each[2][name] and rows[2][name] == each[3][name]


def said(output: Path, name: str) -> list[str]:
    """The lines of the run's log, without their times, and without those that every run has: see `how`."""
    lines = [line.split(" ", 1)[1] for line in (output / name / "log.txt").read_text().splitlines()]
    return [line for line in lines if " a step = " not in line and not line.startswith("commit ")]


def test_epochs_that_are_given_end_a_run_too_and_it_says_so(place, tmp_path):
    train("train_ldm_only", place, tmp_path, "run", epochs=1, **PLAIN)
    assert [row["step"] for row in small.metrics(tmp_path, "run")] == [1, 2]  # 20 images make 2 batches of 8
    why = "--epochs 1 is 2 steps of this data set (2 an epoch), fewer than --max-train-steps 4"
    assert said(tmp_path, "run") == [f"the run will end early: {why}", f"the run has ended: {why}"]


def test_epochs_that_are_enough_are_not_mentioned(place, tmp_path):
    train("train_ldm_only", place, tmp_path, "run", epochs=2, **PLAIN)
    assert len(small.metrics(tmp_path, "run")) == 4 and said(tmp_path, "run") == []


def test_without_epochs_the_steps_alone_count(place, tmp_path, monkeypatch):
    """Beyond the 1400 epochs that end a run of the public code; a step learns nothing here, for time."""
    monkeypatch.setattr(train_ldm_only, "train_step", lambda *_, **__: {"sit_loss": torch.zeros(())})
    steps = dict(batch_size=20, max_train_steps=1500, checkpointing_steps=1500, log_steps=1500)
    train("train_ldm_only", place, tmp_path, "run", **steps, **PLAIN)
    assert [row["step"] for row in small.metrics(tmp_path, "run")] == [1500] and said(tmp_path, "run") == []


def test_a_run_that_is_at_its_end_says_so(place, tmp_path):
    train("train_ldm_only", place, tmp_path, "run", **PLAIN)
    train("train_ldm_only", place, tmp_path, "run", resume="latest", max_train_steps=3, **PLAIN)
    noted = [
        "--max-train-steps was 4 until step 4; now 3",
        "nothing is left to train: the run is at step 4, and ends at 3",
    ]
    assert said(tmp_path, "run") == noted


def test_a_run_of_the_former_default_of_epochs_goes_on(place, tmp_path):
    train("train_ldm_only", place, tmp_path, "run", max_train_steps=2, **PLAIN)
    file = tmp_path / "run" / "args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epochs": 1400, "max_train_steps": 3}))
    train("train_ldm_only", place, tmp_path, "run", max_train_steps=3, resume="latest", **PLAIN)
    assert said(tmp_path, "run") == [] and len(small.metrics(tmp_path, "run")) == 3


@pytest.mark.parametrize("script", ["train_repae", "train_vae"])
def test_weights_that_a_resumed_run_does_not_read_are_named(script, place, tmp_path):
    train(script, place, tmp_path, "run", max_train_steps=2, disc_pretrained_ckpt=place.discriminator)
    other = dict(vae_ckpt=tmp_path / "other.pt", disc_pretrained_ckpt=tmp_path / "disc.pt", max_train_steps=3)
    train(script, place, tmp_path, "run", resume="latest", **other)
    unread = "is not read: the run goes on from the checkpoint of step 2"
    lines = [line for line in said(tmp_path, "run") if not line.startswith("encoder")]
    assert sorted(lines) == [
        f"--disc-pretrained-ckpt {tmp_path / 'disc.pt'} {unread}",
        "--max-train-steps was 2 until step 2; now 3",
        f"--vae-ckpt {tmp_path / 'other.pt'} {unread}",
    ]
    train(script, place, tmp_path, "run", resume="latest", disc_pretrained_ckpt=None, max_train_steps=3)
    assert not [line for line in said(tmp_path, "run") if "None" in line]  # not given is nothing to read


def test_the_learning_rate_of_train_vae_is_that_of_the_vae(place, tmp_path):
    for rate in (0, 0.5):
        train("train_vae", place, tmp_path, f"{rate}", learning_rate=rate, disc_learning_rate=3e-5, max_train_steps=2)
    still, moving = small.metrics(tmp_path, "0"), small.metrics(tmp_path, "0.5")
    assert still[0]["vae_loss"] == moving[0]["vae_loss"] and still[1]["vae_loss"] != moving[1]["vae_loss"]
    saved = small.checkpoint(tmp_path, "0", 2)
    rates = [saved[key]["param_groups"][0]["lr"] for key in ("opt_vae", "opt_disc")]
    assert rates == [0, 3e-5]
    torch.manual_seed(0)
    small.assert_same(saved["vae"], to_ldm(build_vae(small.TINY_VAE)))  # as it was drawn


def test_precision_and_accumulation_are_the_scripts_and_it_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train("train_ldm_only", place, tmp_path, "run", max_train_steps=1, **PLAIN)
    assert said(tmp_path, "run") == [
        "accelerate is configured for mixed_precision bf16, which does not count here: --mixed-precision no does",
        "accelerate is configured for gradient_accumulation_steps 4, which does not count here: "
        "--gradient-accumulation-steps 1 does",
    ]
    options = dict(mixed_precision="bf16", gradient_accumulation_steps=4)
    train("train_ldm_only", place, tmp_path, "alike", max_train_steps=1, **options, **PLAIN)
    assert said(tmp_path, "alike") == []


def test_each_network_has_its_own_optimiser_settings(place, tmp_path):
    settings = dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, adam_weight_decay=0.01)
    rates = dict(learning_rate=2e-4, vae_learning_rate=3e-5, disc_learning_rate=4e-6)
    train("train_repae", place, tmp_path, "run", max_train_steps=1, **settings, **rates)
    saved = small.checkpoint(tmp_path, "run", 1)
    for key, rate in zip(("opt", "opt_vae", "opt_disc"), rates.values(), strict=True):
        group = saved[key]["param_groups"][0]
        assert (group["lr"], group["eps"], group["weight_decay"]) == (rate, 1e-7, 0.01)
        assert tuple(group["betas"]) == (0.8, 0.95)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["vae_learning_rate"] == 3e-5


def test_the_normaliser_starts_from_stored_or_measured_statistics(place, tmp_path):
    """bn follows the batches with --bn-momentum; at 0 it keeps what it started from."""
    stored = torch.load(place.vae.with_name("vae-latents-stats.pt"))
    train("train_repae", place, tmp_path, "stored", max_train_steps=1, bn_momentum=0)
    model = small.checkpoint(tmp_path, "stored", 1)["model"]
    assert torch.equal(model["bn.running_mean"], stored["latents_bias"].flatten())
    torch.testing.assert_close(model["bn.running_var"].rsqrt(), stored["latents_scale"].flatten())
    assert not (tmp_path / "stored" / "latents-stats.pt").exists()

    bare = tmp_path / "bare.pt"
    shutil.copy(place.vae, bare)
    train("train_repae", place, tmp_path, "measured", max_train_steps=1, bn_momentum=0, vae_ckpt=bare)
    measured = torch.load(tmp_path / "measured" / "latents-stats.pt")
    assert measured["latents_scale"].shape == measured["latents_bias"].shape == (1, 4, 1, 1)
    model = small.checkpoint(tmp_path, "measured", 1)["model"]
    assert torch.equal(model["bn.running_mean"], measured["latents_bias"].flatten())
    assert not torch.allclose(measured["latents_bias"], stored["latents_bias"])


def test_without_stop_grad_the_diffusion_loss_reaches_the_vae(whole, place, tmp_path):
    """The paper's negative control: one term more in the VAE's loss, and nothing else in the first step."""
    train("train_repae", place, tmp_path, "run", max_train_steps=1, stop_grad=False)
    (row,) = small.metrics(tmp_path, "run")
    stopped = small.metrics(*whole("train_repae", gradient_accumulation_steps=1))[0]
    assert {name for name in row if row[name] != stopped[name]} == {"vae_loss", "grad_norm_vae"}
    # A fresh SiT says 0 everywhere, so that the term is |noise - x_0|^2: 1 from the noise, and the latents' variance.
    assert row["vae_loss"] - stopped["vae_loss"] > 0.9
