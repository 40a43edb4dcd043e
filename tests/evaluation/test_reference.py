"""References: files of ADM and of other tools, images, saved statistics, and those that do not fit."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.evaluator import compare
from evaluation.reference import read_reference, save_reference
from tests.support.evaluation_data import TinyInception, feature_set, random_images
from utils.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real():
    return random_images(120, 8, 1)


@pytest.fixture(scope="module")
def fake():
    return random_images(100, 8, 2)


def test_adm_reference_gives_its_stored_moments_and_the_neighbours_of_its_images(tmp_path, real, fake):
    network = TinyInception()
    whole = feature_set(real, network)
    stored = {"mu": whole.pool[0] + 1, "sigma": whole.pool[1], "mu_s": whole.spatial[0], "sigma_s": whole.spatial[1]}
    np.savez(tmp_path / "adm.npz", arr_0=real[:50], **{name: value.numpy() for name, value in stored.items()})
    reference = read_reference(tmp_path / "adm.npz", network, (8, 8), CPU)
    assert torch.equal(reference.pool[0], stored["mu"]) and torch.equal(reference.spatial[1], stored["sigma_s"])
    torch.testing.assert_close(reference.features, whole.features[:50], rtol=0, atol=0)

    np.savez(tmp_path / "moments.npz", mu=stored["mu"].numpy(), sigma=stored["sigma"].numpy())
    samples = feature_set(fake, network)
    alone = compare(samples, read_reference(tmp_path / "moments.npz", network, (8, 8), CPU), network, CPU)
    assert list(alone) == ["fid", "inception_score", "inception_score_std"]
    assert alone["fid"] == compare(samples, reference, network, CPU)["fid"]


def test_saved_statistics_give_the_same_numbers(tmp_path, real, fake):
    network = TinyInception()
    np.savez(tmp_path / "real.npz", arr_0=real)
    reference = read_reference(tmp_path / "real.npz", network, (8, 8), CPU)
    save_reference(tmp_path / "stats.npz", reference, network, (8, 8), CPU, "real.npz")
    again = read_reference(tmp_path / "stats.npz", network, (8, 8), CPU)
    samples = feature_set(fake, network)
    assert compare(samples, again, network, CPU) == compare(samples, reference, network, CPU)
    assert again.count == 120


def test_moments_of_other_tools_are_used_with_a_note(tmp_path, real, fake, caplog):
    network = TinyInception()
    mean, covariance = (moment.numpy() for moment in feature_set(real, network).pool)
    np.savez(tmp_path / "pytorch-fid.npz", mu=mean, sigma=covariance)
    reference = read_reference(tmp_path / "pytorch-fid.npz", network, (8, 8), CPU)
    resizing, missing = reference.notes
    assert "holds mu and sigma alone, as pytorch-fid and clean-fid write them: their resizing is another" in resizing
    assert "nothing to compute sFID, precision, recall or KID from" in missing
    assert resizing in caplog.text and missing in caplog.text

    # Saved as a file of ours, they are still what they were.
    save_reference(tmp_path / "ours.npz", reference, network, (8, 8), CPU, "pytorch-fid.npz")
    again = read_reference(tmp_path / "ours.npz", network, (8, 8), CPU)
    assert again.notes == reference.notes and again.count is None
    samples = feature_set(fake, network)
    assert compare(samples, again, network, CPU) == compare(samples, reference, network, CPU)


def edm2_file(path, **spaces):
    path.write_bytes(pickle.dumps({"num_images": 120, **spaces}))
    return path


def test_edm2_reference_gives_the_moments_of_its_space(tmp_path, real):
    network = TinyInception()
    fid, other = feature_set(real, network).pool, (torch.zeros(6), torch.eye(6))
    spaces = {
        name: {"mu": mean.numpy(), "sigma": covariance.numpy()}
        for name, (mean, covariance) in {"fid": fid, "fd_dinov2": other}.items()
    }
    path = edm2_file(tmp_path / "img512.pkl", **spaces)
    for label, pool in (("inception", fid), ("dinov2-vit-l", other)):
        network.label = label
        found = read_reference(path, network, (8, 8), CPU)
        assert all(torch.equal(a, b.double()) for a, b in zip(found.pool, pool, strict=True))
        assert found.count == 120 and found.features is None and found.spatial is None

    network.label = "dinov2-vit-b"
    with pytest.raises(InputError, match=r"img512\.pkl holds num_images, fid, fd_dinov2; .*dinov2-vit-b was given"):
        read_reference(path, network, (8, 8), CPU)


def test_an_edm2_reference_that_does_not_fit_is_refused(tmp_path):
    path = edm2_file(tmp_path / "r.pkl", fid={"mu": np.zeros(5), "sigma": np.eye(5)})
    with pytest.raises(InputError, match=r"r\.pkl: mu is \(5,\); \(6,\) is needed"):
        read_reference(path, TinyInception(), (8, 8), CPU)
    with pytest.raises(InputError, match=r"r\.pkl: mu is absent"):
        read_reference(edm2_file(path, fid={"mu": "text"}), TinyInception(), (8, 8), CPU)


@pytest.mark.parametrize("names", [("mu1", "sigma1"), ("mu",), ("feats",)])
@pytest.mark.parametrize("label", ["inception", "dinov2-vit-l"])
def test_arrays_of_unknown_names_are_refused_by_name(tmp_path, names, label):
    np.savez(tmp_path / "r.npz", **{name: np.zeros(6) for name in names})
    network = TinyInception()
    network.label = label
    with pytest.raises(InputError, match=rf"r\.npz holds {', '.join(names)}; arr_0 \(images\), or mu and sigma"):
        read_reference(tmp_path / "r.npz", network, (8, 8), CPU)


def test_notes_on_images_stay_with_their_statistics(tmp_path, real, caplog):
    network = TinyInception()
    np.savez(tmp_path / "grey.npz", arr_0=real[..., 0])
    reference = read_reference(tmp_path / "grey.npz", network, (8, 8), CPU)
    (note,) = reference.notes
    assert "grey images (120, 8, 8) are read as RGB" in note and caplog.text.count(note) == 1
    save_reference(tmp_path / "s.npz", reference, network, (8, 8), CPU, "grey.npz")
    assert read_reference(tmp_path / "s.npz", network, (8, 8), CPU).notes == (note,)
    save_reference(tmp_path / "s.npz", replace(reference, notes=()), network, (8, 8), CPU, "grey.npz")
    assert read_reference(tmp_path / "s.npz", network, (8, 8), CPU).notes == ()


def test_saved_statistics_of_other_weights_space_or_size_are_refused(tmp_path, real):
    network = TinyInception()
    save_reference(tmp_path / "s.npz", feature_set(real, network), network, (8, 8), CPU, "real")
    with pytest.raises(InputError, match="made with other weights of inception"):
        read_reference(tmp_path / "s.npz", TinyInception(seed=1), (8, 8), CPU)
    with pytest.raises(InputError, match=r"from \(8, 8\) images; \(16, 16\) is needed"):
        read_reference(tmp_path / "s.npz", network, (16, 16), CPU)
    network.label = "dinov2-vit-l"
    with pytest.raises(InputError, match="made in the space of inception; --features asks for dinov2-vit-l"):
        read_reference(tmp_path / "s.npz", network, (8, 8), CPU)


@pytest.mark.parametrize(
    "name, value", [("mu", np.zeros(2048)), ("sigma", np.zeros((6, 5))), ("mu", np.full(6, np.nan))]
)
def test_moments_that_do_not_fit_are_refused(tmp_path, name, value):
    arrays = {"mu": np.zeros(6), "sigma": np.eye(6)} | {name: value}
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(InputError, match=rf"r\.npz: {name} is"):
        read_reference(tmp_path / "r.npz", TinyInception(), (8, 8), CPU)
