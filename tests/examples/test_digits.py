"""The pieces of examples/digits that are not scripts of the repository; run.sh itself is `make quickstart`."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from configs.options import PARSERS
from examples.digits import compute, judge, make_images, pretrain_encoder, report, study
from loss.config import read_loss_config
from models.encoders import load_encoder
from models.vae import build_vae


def test_images_are_the_scans(tmp_path):
    from sklearn.datasets import load_digits

    make_images.main(["--out", str(tmp_path)])
    digits = load_digits()
    files = sorted(tmp_path.rglob("*.png"), key=lambda path: path.stem)
    assert len(files) == 1797
    assert [int(path.parent.name) for path in files] == digits.target.tolist()
    for i in range(0, 1797, 100):
        with Image.open(files[i]) as image:
            assert (image.mode, image.size) == ("RGB", (24, 24))
            # Back to the scan's own grid (with its margin): dark where the scan has ink.
            ink = 255 - np.asarray(image.convert("L").resize((10, 10), Image.Resampling.BOX), np.float32)
        assert np.corrcoef(ink[1:-1, 1:-1].ravel(), digits.images[i].ravel())[0, 1] > 0.9


@pytest.fixture
def data(tmp_path):
    """A data folder of 40 images whose class is their brightness."""
    labels = np.arange(40) % 2
    images = np.random.default_rng(0).integers(0, 100, (40, 3, 24, 24)) + 150 * labels[:, None, None, None]
    np.save(tmp_path / "images.npy", images.astype(np.uint8))
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path


def test_the_saved_encoder_loads_bit_equal(data):
    pixels, labels = pretrain_encoder.load_data(data)
    torch.manual_seed(0)
    model = pretrain_encoder.build_encoder(24, num_classes=2)
    losses = [loss for _, loss in pretrain_encoder.train(model, pixels, labels, steps=2, batch_size=8, seed=0)]
    assert len(losses) == 2
    pretrain_encoder.save_encoder(model.eval(), data / "encoder", 24)

    loaded = timm.create_model(f"local-dir:{data / 'encoder'}", pretrained=True).eval()
    encoder = load_encoder(f"timm:local-dir:{data / 'encoder'}", resolution=24)
    images = torch.from_numpy(np.load(data / "images.npy"))[:4]
    with torch.inference_mode():
        assert torch.equal(loaded(pixels[:4]), model(pixels[:4]))
        tokens = model.forward_features(pixels[:4])
        assert encoder.embed_dim == 96 and tokens.shape == (4, 9, 96)  # the grid of SiT-T/2 on latents of 6 x 6
        torch.testing.assert_close(encoder(images), tokens, rtol=1e-5, atol=1e-5)


def test_the_encoder_learns_brightness(data):
    """The script end to end: what it saved separates the two classes."""
    pretrain_encoder.main(
        ["--data-dir", str(data), "--out", str(data / "encoder"), "--steps", "20", "--batch-size", "8"]
    )
    model = timm.create_model(f"local-dir:{data / 'encoder'}", pretrained=True)
    assert pretrain_encoder.accuracy(model, *pretrain_encoder.load_data(data)) == 1


def test_augmentation_keeps_a_blank_page(data):
    """Shifts and turns bring in paper, not another colour."""
    moved = pretrain_encoder.augment(torch.ones(64, 3, 24, 24), torch.Generator().manual_seed(0))
    assert moved.mean().item() == pytest.approx(1, abs=1e-3) and moved.std().item() == pytest.approx(0.1, rel=0.02)


def test_loss_config_differs_in_lpips_and_gan_alone():
    digits = asdict(read_loss_config("examples/digits/digits_l1_kl_gan.yaml"))
    public = asdict(read_loss_config("configs/l1_lpips_kl_gan.yaml"))
    assert {key for key in public if digits[key] != public[key]} == {"perceptual_weight", "discriminator_weight"}
    assert digits["perceptual_weight"] == 0


@pytest.fixture(scope="module")
def real():
    """600 digits as the data folder holds them, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([np.asarray(make_images.enlarge(digit)) for digit in digits.images[:600]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(digits.target[:600])


@pytest.fixture(scope="module")
def trained_judge(real):
    return judge.train_judge(*real, epochs=15)


def test_the_judge_reads_digits_and_tells_sets_apart(real, trained_judge):
    images, labels = real
    network, held_out = trained_judge
    assert held_out > 0.85 and judge.accuracy(network, images, labels) > 0.9
    assert judge.accuracy(network, images, (labels + 1) % 10) < 0.05
    same, halves, ones = (judge.distance(network, part, images) for part in (images, images[::2], images[labels == 1]))
    assert same == pytest.approx(0, abs=1e-6) and same < halves < ones / 5
    again, _ = judge.train_judge(*real, epochs=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), judge.train_judge(*real, epochs=1)[0].parameters(), strict=True)
    )


def test_the_study_runs_commands_that_exist(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(study, "run", lambda *words, threads=1: commands.append([str(word) for word in words]))
    study.prepare(tmp_path, 5)
    names = {method: study.train(tmp_path, method, 7, 2) for method in study.METHODS}
    assert names["no stop-grad"] == "no-stop-grad-2"
    parsed = {}
    for script, *words in (command for command in commands if command[0] in PARSERS):
        args = PARSERS[script]().parse_args(words)
        parsed[getattr(args, "exp_name", script)] = args
    runs = {method: parsed[name] for method, name in names.items()}
    assert {(args.max_train_steps, args.seed, args.batch_size, args.model) for args in runs.values()} == {
        (7, 2, 32, "SiT-T/2")
    }
    assert (runs["SiT"].enc_type, runs["SiT"].proj_coeff, runs["REPA"].proj_coeff) == ("None", 0, 0.5)
    assert runs["REPA-E"].stop_grad and not runs["no stop-grad"].stop_grad
    assert runs["REPA"].vae_latents_name == "vae" and runs["E2E-VAE"].vae_latents_name == "e2e-2"
    assert runs["E2E-VAE"].vae_ckpt == str(tmp_path / "exps/e2e-2/e2e-2.pt")
    assert parsed["save_vae_weights.py"].repae_ckpt == str(tmp_path / "exps/repa-e-2/checkpoints/0000007.pt")


def test_the_study_measures_and_shows(tmp_path, monkeypatch, real, trained_judge):
    images, labels = real
    drawn = []
    monkeypatch.setattr(study, "run", lambda *words: drawn.append(PARSERS[words[0]]().parse_args(map(str, words[1:]))))
    monkeypatch.setattr(study, "samples_of", lambda folder, name, steps: (images, labels))
    monkeypatch.setattr(study, "load_trained", lambda path, steps: SimpleNamespace(vae=build_vae("f4d4-tiny").eval()))
    found = study.measure(tmp_path, "repa-e-1", 7, 1, trained_judge[0], images)
    assert found["fd"] == pytest.approx(0, abs=1e-6) and found["accuracy"] > 0.9 and 0 < found["psnr"] < 30
    assert drawn[0].exp_path == str(tmp_path / "exps/repa-e-1") and drawn[0].label_sampling == "equal"

    runs = [found | {"seconds": 60.0}, {"fd": 4.0, "accuracy": 0.5, "psnr": 20.0, "seconds": 120.0}]
    results = dict.fromkeys(study.METHODS, runs)
    row = next(line for line in study.table(results, 7, 0.99).splitlines() if line.startswith("| REPA-E "))
    assert "| 2.00 (2.83) |" in " ".join(row.split()) and "| 1.5 |" in row
    strips = dict.fromkeys(study.METHODS, study.sample_strip(images))
    assert strips["SiT"].shape == (24, 240, 3)
    study.plot(results, strips, tmp_path / "study.png", 7)
    with Image.open(tmp_path / "study.png") as picture:
        assert picture.width > 1000 and np.asarray(picture).std() > 10


def test_the_report_shows_losses_readings_and_seconds(data, capsys):
    for name in ("data", "samples"):
        (data / name).mkdir()
    labels = np.arange(40) // 4  # in the order of preprocessing.py: class by class
    images = np.repeat(25 * labels, 3 * 24 * 24).astype(np.uint8).reshape(40, 3, 24, 24)  # grey says the class
    np.save(data / "data" / "images.npy", images)
    np.save(data / "data" / "labels.npy", labels)
    for run, read_as in (("repae", labels), ("ldm", (labels + 1) % 10)):
        np.savez(data / "samples" / f"{run}_0000002_cfg1.5.npz", arr_0=images.transpose(0, 2, 3, 1), arr_1=read_as)
        record = {"evaluation": {report.FD: 12.25}}
        (data / "samples" / f"{run}_0000002_cfg1.5.json").write_text(json.dumps(record))
    row = {"reconstruction_loss": 0.125, "vae_align_loss": -0.5, "proj_loss": -0.5, "denoising_loss": 1.0}
    for run in ("vae", "repae", "ldm"):
        (data / "exps" / run).mkdir(parents=True)
        rows = [json.dumps({"step": 1, **row}), json.dumps({"step": 2, **row, "proj_loss": None})]  # null: not finite
        (data / "exps" / run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        (data / "exps" / run / "evaluations.jsonl").write_text(json.dumps({"step": 2, report.FD: 50.0}) + "\n")
    (data / "seconds.tsv").write_text("train_vae\t3\ntrain_repae\t4\n")

    report.main(["--folder", str(data)])
    out = capsys.readouterr().out
    assert (
        "reconstruction_loss 0.1250" in out
        and "proj_loss" not in out
        and "in all" in out
        and "100.0%   12.2 REPA-E samples" in out
    )
    assert "  0.0%   12.2 samples of the LDM" in out
    for name in ("samples.png", "report.png"):
        with Image.open(data / name) as image:
            assert image.width > 1000 and np.asarray(image).std() > 10


@pytest.mark.parametrize(
    "main, flag", [(pretrain_encoder.main, "--data-dir"), (report.main, "--folder")], ids=["encoder", "report"]
)
def test_missing_folder_is_one_line(tmp_path, capsys, main, flag):
    with pytest.raises(SystemExit) as exit:
        main([flag, str(tmp_path / "absent")])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_study_of_compute_gives_every_method_the_time_of_the_first(tmp_path, monkeypatch, trained_judge, real):
    """Steps that cost 4, 2, 1 and 0.5 s: 8, 16, 32 and 64 of them; each run is measured after 8 and at its end."""
    costs = dict(zip(compute.TURNS, (4.0, 2.0, 1.0, 0.5), strict=True))
    trained, measured = [], []

    def run(*words, threads=1):
        args = vars(PARSERS[words[0]]().parse_args([str(word) for word in words[1:]]))
        every = args.get("vae_every")
        trained.append((every, args["max_train_steps"]))
        name = next(name for name, turn in compute.TURNS.items() if turn == every)
        return 10 + costs[name] * args["max_train_steps"]

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(judge, "load_digits_data", lambda _: (real[0], real[1]))
    monkeypatch.setattr(judge, "train_judge", lambda *_: (trained_judge[0], 0.9))
    numbers = dict(fd=1.0, accuracy=0.5, psnr=20.0)
    monkeypatch.setattr(study, "measure", lambda folder, name, steps, *_: measured.append((name, steps)) or numbers)
    compute.main(["--folder", str(tmp_path), "--steps", "8", "--seeds", "1"])
    assert sorted(trained[-4:], key=str) == sorted([(1, 8), (2, 16), (4, 32), (None, 64)], key=str)
    assert len(measured) == 7 and {("every-4-0", 8), ("every-4-0", 32), ("every-never-0", 64)} <= set(measured)
    rows = (tmp_path / "compute.md").read_text().splitlines()
    assert rows[4].startswith("| K = 4 | 1000 | 1.00 | 32 |") and rows[2].split("|")[5].strip() == "0.7"
