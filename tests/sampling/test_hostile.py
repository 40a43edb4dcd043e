"""Trained runs, partial sample files and labels that are broken: taken up, begun anew, or one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampling.labels import read_labels
from sampling.store import SampleStore
from sampling.trained import load_trained
from tests.support.hostile import FEW, THINGS, another_state, broken, broken_json, changed, npy, outcome
from tests.support.refusals import refusal

JOB = {"run": "r", "options": {"num_steps": 5, "seed": 0, "classes": None}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def store_of(folder: Path) -> SampleStore:
    return SampleStore(folder / "r.npz", count=6, resolution=3, batch_size=4)


BROKEN_FILES = st.one_of(
    st.tuples(st.just("json"), broken_json(JOB)),
    st.tuples(st.just("npy"), npy(data=bytes(6 * 27))),
    st.tuples(st.just("done"), st.binary(max_size=3)),
)


@FEW
@given(BROKEN_FILES)
def test_broken_partial_files_are_refused_or_begun_anew(folder, kind_and_data):
    """With a batch on file; after `create` they are whole, or nothing was touched."""
    store = store_of(folder)
    store.discard()
    store.create(JOB)
    store.write(0, np.full((4, 3, 3, 3), 7, np.uint8))
    kind, data = kind_and_data
    (folder / f"r.partial.{kind}").write_bytes(data)
    store.release()

    again = store_of(folder)
    again.interrupted()
    outcome(again.create, JOB)
    outcome(again.create, JOB, overwrite=True)
    again.release()
    assert again.images().shape == (6, 3, 3, 3) and set(again.missing()) <= {0, 1}
    again.write(1, np.full((4, 3, 3, 3), 8, np.uint8))
    assert (again.read(1) == 8).all()


TEXTS = st.lists(st.integers(-3, 2**70) | st.sampled_from(["x", "1.5", "1_0", "\0"]), max_size=4).map(
    lambda words: " ".join(map(str, words)).encode()
)


@given(st.tuples(st.just("x.npy"), npy()) | st.tuples(st.just("x.txt"), TEXTS | st.binary(max_size=9)))
def test_broken_labels_are_one_line_or_whole_numbers(folder, name_and_data):
    name, data = name_and_data
    (folder / name).write_bytes(data)
    labels = outcome(read_labels, str(folder / name), 1)
    assert labels is None or (labels.dtype == np.int64 and labels.min() >= 0)


# Trained runs


@pytest.fixture(scope="module")
def run(exps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(exps / "ldm", folder / "ldm")
    shutil.copytree(exps / "repae", folder / "repae")
    return folder


@FEW
@given(data=st.data())
def test_a_run_of_other_options_is_loaded_or_refused(run, data):
    whole = torch.load(run / "ldm" / "checkpoints" / "0000007.pt")
    (run / "x" / "checkpoints").mkdir(parents=True, exist_ok=True)
    recorded = data.draw(changed(whole["args"]))
    torch.save(whole | {"args": recorded}, run / "x" / "checkpoints" / "0000007.pt")
    (run / "x" / "args.json").write_bytes(data.draw(broken_json(whole["args"])))
    outcome(load_trained, run / "x")
    (run / "x" / "args.json").unlink()


@FEW
@given(data=st.data())
def test_a_checkpoint_of_other_contents_is_loaded_or_refused(run, data):
    name = data.draw(st.sampled_from(["ldm", "repae"]))
    contents = torch.load(run / name / "checkpoints" / "0000007.pt")
    for key in data.draw(st.lists(st.sampled_from(sorted({*contents} - {"format"})), min_size=1, max_size=2)):
        is_state = isinstance(contents[key], dict) and key in ("model", "ema", "vae")
        odd = st.sampled_from([*THINGS, "7", "x", -1, True, float("nan")])
        contents[key] = data.draw(odd | another_state(contents[key]) if is_state else odd)
    torch.save(contents, run / "x.pt")
    for ema in (True, False):
        outcome(load_trained, run / "x.pt", ema=ema)


@FEW
@given(data=st.data())
def test_a_broken_checkpoint_is_refused(run, data):
    """Only its end, where the archive's list of contents and the pickle lie; in between there are numbers alone."""
    whole = (run / "repae" / "checkpoints" / "0000007.pt").read_bytes()
    (run / "x.pt").write_bytes(whole[:-9000] + data.draw(broken(whole[-9000:])))
    outcome(load_trained, run / "x.pt")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"vae": ["f4d4-tiny"]}, "vae is a list; a text is needed"),
        ({"vae_ckpt": 5}, "vae_ckpt is a int; a text is needed"),
        ({"path_type": "sigmoid"}, "path_type is 'sigmoid'; linear or cosine is needed"),
    ],
)
def test_options_of_another_kind_are_named(run, option, words):
    whole = torch.load(run / "ldm" / "checkpoints" / "0000007.pt")
    torch.save(whole | {"args": whole["args"] | option}, run / "y.pt")
    assert words in refusal(load_trained, run / "y.pt")
