"""A run and its samples agree: statistics, classes, and the pictures of previews and evaluations, bit for bit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import cache_latents
import generate
import train_ldm_only
import train_repae
from evaluation.evaluator import Evaluator
from tests.support import small
from utils.rng import sample_labels

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only}
COUNT, SEED = 8, 3  # a batch of previews


def train(script, place, output, name="run", **options):
    SCRIPTS[script].main(small.OPTIONS[script](place, output, name, **options))
    return output / name


def sample(run, folder, **options) -> tuple[np.ndarray, dict]:
    """Images (N, H, W, 3) and the record of generate.py."""
    usual = dict(num_fid_samples=COUNT, pproc_batch_size=COUNT, global_seed=SEED)
    generate.main(small.argv(**dict(exp_path=run, sample_dir=folder) | usual | options))
    (npz,) = folder.glob("*.npz")
    return np.load(npz)["arr_0"], json.loads(npz.with_suffix(".json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_samples_previews_and_online_evaluation_are_the_same_pictures(script, place, tmp_path, monkeypatch, few_steps):
    seen = []
    monkeypatch.setattr(Evaluator, "add", lambda self, images, indices: seen.append(images.numpy()))
    monkeypatch.setattr(Evaluator, "result", lambda self: {"fd": 0.0})
    online = dict(eval_steps=4, eval_reference=place.data, eval_features=place.encoder, eval_samples=COUNT)
    learning = dict(seed=SEED, learning_rate=0.01, ema_decay=0.5)
    run = train(script, place, tmp_path, num_preview=COUNT, sampling_steps=4, **learning, **online)

    with Image.open(run / "samples" / "0000004-samples.png") as picture:
        preview = np.asarray(picture).reshape(small.RESOLUTION, COUNT, small.RESOLUTION, 3).swapaxes(0, 1)
    spread = [i * small.CLASSES // COUNT for i in range(COUNT)]
    (tmp_path / "spread.txt").write_text("\n".join(map(str, spread)))
    images, _ = sample(run, tmp_path / "a", cfg_scale=4, num_steps=3, label_file=tmp_path / "spread.txt")
    assert np.array_equal(images, preview) and images.std() > 1

    images, _ = sample(run, tmp_path / "b", cfg_scale=1, num_steps=3, pproc_batch_size=64)
    assert np.array_equal(images.transpose(0, 3, 1, 2), seen[0])


def test_an_ldm_that_goes_on_from_a_repae_run_is_sampled_with_the_statistics_that_it_kept(place, tmp_path):
    joint = train("train_repae", place, tmp_path, "joint", max_train_steps=2, vae_learning_rate=0, bn_momentum=0.9)
    on = dict(resume_step=2, continue_train_exp_dir=joint, enc_type=place.encoder, max_train_steps=3)
    ldm = train("train_ldm_only", place, tmp_path, "ldm", checkpointing_steps=3, **on)
    said = (ldm / "log.txt").read_text()
    assert said.count("the VAE's own differ by up to") == 1
    model = small.checkpoint(tmp_path, "ldm", 3)["model"]
    assert torch.equal(model["bn.running_mean"], small.checkpoint(tmp_path, "joint", 2)["model"]["bn.running_mean"])
    _, record = sample(ldm, tmp_path / "s", num_steps=2, cfg_scale=1)
    assert len(record["notes"]) == 1 and "latent statistics" in record["notes"][0]


def test_classes_that_no_image_has_are_not_drawn(place, tmp_path):
    """--num-classes is the data's own; a larger one is allowed, said, and does not reach samples or evaluations."""
    own = train("train_ldm_only", place, tmp_path, "own", num_classes=None, max_train_steps=1)
    args = json.loads((own / "args.json").read_text())
    assert args["num_classes"] == small.CLASSES and args["seen_classes"] == f"0-{small.CLASSES - 1}"
    assert "samples are drawn" not in (own / "log.txt").read_text()

    wide = train("train_ldm_only", place, tmp_path, "wide", num_classes=50, max_train_steps=1)
    assert (wide / "log.txt").read_text().count("have the classes 0-3 of 0-49: samples are drawn from these alone") == 1
    options = dict(num_steps=1, cfg_scale=1, num_fid_samples=40, pproc_batch_size=40)
    _, record = sample(wide, tmp_path / "a", **options)
    labels = np.load(next((tmp_path / "a").glob("*.npz")))["arr_1"]
    assert np.array_equal(labels, sample_labels(SEED, range(40), small.CLASSES).numpy())
    assert record["notes"] == ["labels are drawn from classes that the run saw: 0-3 of 0-49"]
    _, record = sample(wide, tmp_path / "b", num_classes=50, **options)
    (note,) = record["notes"]
    assert note == "the classes 4-49 are drawn, too, which the run never saw"
    _, record = sample(wide, tmp_path / "c", label_sampling="equal", **options)  # 40 divide by 4 classes, not by 50
    labels = np.load(next((tmp_path / "c").glob("*.npz")))["arr_1"]
    assert np.array_equal(np.bincount(labels), [10] * 4)


def test_a_run_that_goes_on_keeps_the_number_of_classes_of_its_checkpoint(place, tmp_path, capsys):
    train("train_ldm_only", place, tmp_path, "run", num_classes=50, max_train_steps=2)
    train("train_ldm_only", place, tmp_path, "run", num_classes=None, max_train_steps=3, resume="latest")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["num_classes"] == 50

    more = small.write_data(tmp_path / "more", classes=60, count=60)
    on = dict(data_dir=more, resume_step=2, continue_train_exp_dir=tmp_path / "run", num_classes=None)
    with pytest.raises(SystemExit):
        train("train_repae", place, tmp_path, "on", **on)
    assert not (tmp_path / "on").exists()


def test_named_classes_without_images_leave_room_and_do_not_stand_in_the_way(place, tmp_path):
    data = small.write_data(tmp_path / "data")
    info = json.loads((data / "dataset.json").read_text()) | {"class_names": list("abcdef")}
    (data / "dataset.json").write_text(json.dumps(info))
    run = train("train_repae", place, tmp_path, "own", data_dir=data, num_classes=None, max_train_steps=1)
    args = json.loads((run / "args.json").read_text())
    assert (args["num_classes"], args["seen_classes"]) == (6, "0-3")
    train("train_repae", place, tmp_path, "fewer", data_dir=data, num_classes=small.CLASSES, max_train_steps=1)


def test_the_unconditional_network_is_sampled_by_its_null_label(place, tmp_path, capsys):
    run = train("train_ldm_only", place, tmp_path, max_train_steps=3, learning_rate=0.01, ema_decay=0)
    null, _ = sample(run, tmp_path / "a", classes="null", cfg_scale=1, num_steps=2)
    npz = next((tmp_path / "a").glob("*.npz"))
    assert set(np.load(npz)["arr_1"]) == {small.CLASSES} and "unconditional" in npz.name
    other, _ = sample(run, tmp_path / "b", classes="0", cfg_scale=1, num_steps=2)
    assert null.shape == other.shape and not np.array_equal(null, other)
    with pytest.raises(SystemExit):
        sample(run, tmp_path / "c", classes="null", cfg_scale=2)
    assert "--classes null needs 1" in capsys.readouterr().err


def test_an_ldm_goes_on_at_another_resolution(place, tmp_path):
    plain = dict(enc_type="None", proj_coeff=0)
    train("train_ldm_only", place, tmp_path, "small", max_train_steps=1, **plain)
    data = small.write_data(tmp_path / "larger", resolution=48)
    cache_latents.main(small.cache_options(place, place.latents, data_dir=data, output_dir=data))
    on = dict(data_dir=data, resolution=48, resume_step=1, continue_train_exp_dir=tmp_path / "small", max_train_steps=2)
    run = train("train_ldm_only", place, tmp_path, "on", **plain, **on)
    assert (run / "log.txt").read_text().count("its 3 x 3 tokens become 6 x 6") == 1


def test_joint_training_starts_from_a_trained_ldm_and_goes_on_at_another_resolution(place, tmp_path, capsys):
    ldm = train("train_ldm_only", place, tmp_path, "ldm", max_train_steps=2, learning_rate=0.01)
    start = ldm / "checkpoints" / "0000002.pt"
    joint = train("train_repae", place, tmp_path, "joint", sit_ckpt=start, max_train_steps=1, learning_rate=0)
    ours, theirs = small.checkpoint(tmp_path, "joint", 1)["model"], small.checkpoint(tmp_path, "ldm", 2)["ema"]
    for key in ours:
        assert key.startswith("bn.") or torch.equal(ours[key], theirs[key]), key

    with pytest.raises(SystemExit):
        train("train_repae", place, tmp_path, "refused", sit_ckpt=start, model="SiT-T/1")
    assert capsys.readouterr().err.count("--sit-ckpt: ") == 1 and not (tmp_path / "refused").exists()

    data = small.write_data(tmp_path / "larger", resolution=48)
    larger = dict(data_dir=data, resolution=48, resume_step=1, continue_train_exp_dir=joint, max_train_steps=2)
    run = train("train_repae", place, tmp_path, "larger-run", **larger)
    assert (run / "log.txt").read_text().count("its 3 x 3 tokens become 6 x 6") == 1
    assert small.checkpoint(tmp_path, "larger-run", 2)["model"]["pos_embed"].shape[1] == 36
