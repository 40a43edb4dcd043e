"""generate.py: sample i depends on (seed, i) alone, a killed job goes on, and what was done is on record."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from configs.arguments import generate_parser
from sampling import generation, labels
from tests.support import small
from tests.support.evaluation_data import encoder_folder, samples_file
from tests.support.forks import Fork
from tests.support.sampling import (
    BATCH,
    CLASSES,
    COUNT,
    SIDE,
    difference,
    draw,
    flags,
    interrupt,
    record_calls,
    refused,
)
from utils.files import sha256


@pytest.fixture(scope="module")
def whole(exps, tmp_path_factory):
    """An ordinary job in one piece, by one process."""
    return draw(exps, tmp_path_factory.mktemp("whole"), mode="sde", label_sampling="random")


@pytest.fixture
def draws(monkeypatch):
    """{(seed, purpose, sample number): bits} of all that is drawn; a second draw of the same must give the same."""
    seen = {}

    def note(kind, drawing):
        def noted(seed, *rest):
            *purpose, indices, _ = rest  # a shape, or a number of classes
            values = drawing(seed, *rest)
            for index, value in zip(indices, values, strict=True):
                key = (kind, seed, *purpose, index)
                assert seen.setdefault(key, value.numpy().tobytes()) == value.numpy().tobytes(), key
            return values

        return noted

    monkeypatch.setattr(generation, "sample_normal", note("normal", generation.sample_normal))
    monkeypatch.setattr(labels, "sample_labels", note("label", labels.sample_labels))
    return seen


# Sample i depends on (seed, i) alone


@pytest.mark.parametrize("batch_size", [3, 20])
def test_the_batch_size_moves_no_draw_and_hardly_a_level(exps, whole, tmp_path, draws, batch_size):
    other = draw(exps, tmp_path / "a", mode="sde", pproc_batch_size=batch_size)
    found = dict(draws)
    draw(exps, tmp_path / "b", mode="sde", pproc_batch_size=BATCH)  # `draws` compares every bit with those before
    purposes = {"noise", "step 0", "step 1"}
    assert {key for key in found if key[-1] < COUNT} == {
        *(("normal", 0, purpose, i) for purpose in purposes for i in range(COUNT)),
        *(("label", 0, i) for i in range(COUNT)),
    }
    assert np.array_equal(other.labels, whole.labels)
    apart = difference(other.images, whole.images)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


def test_the_number_of_samples_does_not_matter(exps, whole, tmp_path):
    fewer = draw(exps, tmp_path, mode="sde", num_fid_samples=13)
    assert np.array_equal(fewer.images, whole.images[:13]) and np.array_equal(fewer.labels, whole.labels[:13])


def test_the_seed_does_matter(exps, whole, tmp_path):
    other = draw(exps, tmp_path, mode="sde", global_seed=1)
    assert not np.array_equal(other.labels, whole.labels)
    assert (difference(other.images, whole.images).max(axis=(1, 2, 3)) > 20).all()
    assert "_seed1" in other.npz.stem


def test_samples_differ_from_each_other(whole):
    """Without this, the tests here would also pass for a generator of one image."""
    assert len({image.tobytes() for image in whole.images}) == COUNT
    assert whole.images.std(axis=0).mean() > 10 and 0 < np.median(whole.images) < 255


@pytest.fixture(scope="module")
def elsewhere(exps, tmp_path_factory):
    """The job of `whole` by two processes, which also measure it, and by one that SIGKILL ends in its third batch."""
    folder = tmp_path_factory.mktemp("elsewhere")
    reference, encoder = samples_file(folder / "reference.npz", 40, SIDE, 1), encoder_folder(folder / "vit", SIDE)
    measured = dict(evaluate=reference, features=encoder)
    killed = Fork("tests/support/workers/killed_sampler.py", *flags(exps, folder / "killed", mode="sde"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = small.run_python(*launch, "generate.py", *flags(exps, folder / "two", mode="sde", **measured))
    ended = {"two": two, "killed": killed.wait()}
    return SimpleNamespace(folder=folder, measured=measured, ended=ended)


def test_two_processes_give_the_same_file(whole, elsewhere):
    assert elsewhere.ended["two"].returncode == 0, elsewhere.ended["two"].stderr
    two = elsewhere.folder / "two" / whole.npz.name
    assert two.read_bytes() == whole.npz.read_bytes()
    assert two.with_suffix(".png").read_bytes() == whole.npz.with_suffix(".png").read_bytes()
    assert json.loads(two.with_suffix(".json").read_text())["processes"] == 2


def test_a_killed_job_goes_on_and_gives_the_same_file(exps, whole, elsewhere, draws):
    assert elsewhere.ended["killed"].returncode == -signal.SIGKILL, elsewhere.ended["killed"].stderr
    folder = elsewhere.folder / "killed"
    name = whole.npz.stem
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.partial.{kind}" for kind in ("done", "json", "lock", "npy")
    ]
    resumed = draw(exps, folder, mode="sde")
    assert {key[-1] for key in draws if key[0] == "normal"} == set(range(16, 24))  # its last batch alone
    assert resumed.npz.read_bytes() == whole.npz.read_bytes()
    assert resumed.record["drawn"] == 4
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npz", ".png"]


# A job that goes on, in one process


def test_a_restart_draws_only_what_is_missing(exps, tmp_path, monkeypatch):
    interrupt(exps, tmp_path / "a", monkeypatch, after=2)
    calls = record_calls(monkeypatch)
    resumed = draw(exps, tmp_path / "a", save_png=True, grid="2x3")  # options that the images do not depend on
    assert calls == [2 * BATCH] * 3
    assert np.array_equal(resumed.images, draw(exps, tmp_path / "b").images)
    pictures = [np.asarray(Image.open(resumed.npz.with_suffix("") / f"{i:06d}.png")) for i in range(COUNT)]
    assert np.array_equal(np.stack(pictures), resumed.images)


def test_an_interrupted_job_of_other_options_is_left_alone(exps, tmp_path, monkeypatch, capsys):
    interrupt(exps, tmp_path, monkeypatch, after=1, pproc_batch_size=5)
    line = refused(flags(exps, tmp_path), capsys, tmp_path)
    assert "partial.json" in line and "pproc_batch_size: 5, now 8" in line and "--overwrite" in line
    assert draw(exps, tmp_path, overwrite=True).record["drawn"] == COUNT


def test_what_lies_beside_a_result_is_left_alone(exps, tmp_path, capsys):
    """The record and the pictures of samples that were moved away."""
    job = draw(exps, tmp_path, trajectory=True)
    job.npz.unlink()
    for suffix in (".json", ".png", "-trajectory.png"):
        file = tmp_path / f"{job.npz.stem}{suffix}"
        assert f"{file} exists already" in refused(flags(exps, tmp_path, trajectory=True), capsys, tmp_path)
        file.unlink()
    assert draw(exps, tmp_path, trajectory=True).record["drawn"] == COUNT


def test_a_changed_checkpoint_is_another_job(exps, tmp_path, monkeypatch, capsys):
    interrupt(exps, tmp_path, monkeypatch, after=1)
    changed = tmp_path / "exps" / "repae" / "checkpoints"
    changed.mkdir(parents=True)
    (changed / "0000007.pt").write_bytes((exps / "swapped" / "checkpoints" / "0000007.pt").read_bytes())
    assert "checkpoint: " in refused(flags(tmp_path / "exps", tmp_path), capsys, tmp_path)


def test_an_existing_result_is_left_alone(exps, tmp_path, capsys):
    first = draw(exps, tmp_path)
    line = refused(flags(exps, tmp_path), capsys, tmp_path)
    assert f"--sample-dir: {first.npz} exists already; --overwrite" in line
    refused(flags(exps, tmp_path, num_fid_samples=20, num_steps=3, pproc_batch_size=5), capsys, tmp_path)
    assert draw(exps, tmp_path, overwrite=True).record["drawn"] == COUNT


# Labels


def test_the_network_sees_the_labels_that_the_file_tells(exps, tmp_path):
    random = draw(exps, tmp_path / "a")
    np.save(tmp_path / "labels.npy", random.labels)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, random.labels)))
    for kind in ("npy", "txt"):
        listed = draw(exps, tmp_path / kind, label_file=tmp_path / f"labels.{kind}")
        assert np.array_equal(listed.images, random.images) and np.array_equal(listed.labels, random.labels)
        assert listed.record["labels"] == "file" and listed.npz.stem.endswith("labels-labels")
    np.save(tmp_path / "labels.npy", (random.labels + 1) % CLASSES)
    others = draw(exps, tmp_path / "b", label_file=tmp_path / "labels.npy")
    assert (difference(others.images, random.images).max(axis=(1, 2, 3)) > 2).all()


# Record and evaluation


def test_the_record_says_what_was_done_with_what(exps, whole):
    record = whole.record
    assert record["run"] == "repae" and record["step"] == 7
    assert record["checkpoint"] == str(exps / "repae" / "checkpoints" / "0000007.pt")
    assert record["sha256"]["checkpoint"] == sha256(record["checkpoint"])
    parsed = vars(generate_parser().parse_args(flags(exps, whole.folder, mode="sde")))
    assert record["options"] == json.loads(json.dumps(parsed))
    assert record["labels"] == "random" and record["sampler"]["mode"] == "sde" and record["nfe"] == 3
    assert record["drawn"] == COUNT and record["processes"] == record["threads"] == 1
    assert record["images_per_second"] >= COUNT / record["seconds"] > 0  # of sampling alone
    assert record["versions"]["torch"] == torch.__version__ and record["device"].endswith("CPU")
    assert whole.npz.name == "repae_0000007_cfg1.5-0.0-1.0_sde_steps3_n20.npz"
    assert whole.images.dtype == np.uint8 and whole.images.shape == (COUNT, SIDE, SIDE, 3)


def test_evaluation_gives_what_evaluate_py_gives(exps, whole, elsewhere, tmp_path, monkeypatch, capsys):
    """Also by two processes, and also when some batches are read back from the partial file."""
    measured = elsewhere.measured
    sets = dict(samples=whole.npz, reference=measured["evaluate"], features=measured["features"])
    evaluate.main(small.argv(**sets, output=tmp_path / "expected.json"))
    expected = json.loads((tmp_path / "expected.json").read_text())
    capsys.readouterr()

    two = json.loads((elsewhere.folder / "two" / whole.npz.name).with_suffix(".json").read_text())
    interrupt(exps, tmp_path / "s", monkeypatch, after=1, mode="sde", **measured)
    resumed = draw(exps, tmp_path / "s", mode="sde", **measured)
    printed = capsys.readouterr().out
    for record in (two, resumed.record):
        found = dict(record["evaluation"])
        assert found.pop("reference") == str(measured["evaluate"]) and found.pop("features") == "vit-mean-tokens"
        assert found.pop("notes") == []
        names = {f"{name}_vit-mean-tokens" for name in ("fd", "precision", "recall", "kd", "kd_std")}
        assert found.keys() == names | {"kd_subset_size"}
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)
    assert found["fd_vit-mean-tokens"] > 0 and f"{found['fd_vit-mean-tokens']:.6g}" in printed
