"""The pieces of examples/digits that are not scripts of the repository; run.sh itself is `make quickstart`."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from examples.digits import make_images, pretrain_encoder, report
from loss.config import read_loss_config
from models.encoders import load_encoder


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


def test_encoder_loads_bit_equal(data):
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


def test_encoder_learns_brightness(data):
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


def test_report_of_a_small_folder(data, capsys):
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
        rows = [json.dumps({"step": step, **row}) for step in (1, 2)]
        (data / "exps" / run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        (data / "exps" / run / "evaluations.jsonl").write_text(json.dumps({"step": 2, report.FD: 50.0}) + "\n")
    (data / "seconds.tsv").write_text("train_vae\t3\ntrain_repae\t4\n")

    report.main(["--folder", str(data)])
    out = capsys.readouterr().out
    assert "reconstruction_loss 0.1250" in out and "in all" in out and "100.0%   12.2 REPA-E samples" in out
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
