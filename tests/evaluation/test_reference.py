"""References: ADM's files, images, saved statistics, and those that do not fit."""

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
