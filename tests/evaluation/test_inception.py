"""Inception-v3 against the graph of ADM's suite (golden values under seeded weights), and its weights file."""

import numpy as np
import pytest
import torch

from evaluation import inception
from evaluation.features import exact_float32
from evaluation.inception import load_inception, preprocess
from tests.support.evaluation_data import SEED, inception_file
from tests.support.golden_data import load
from utils.errors import InputError

ARRAYS, _ = load("evaluation/network")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return inception_file(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


def golden_images(side: int) -> torch.Tensor:
    m, i, j, k = np.ogrid[:2, :side, :side, :3]
    images = (i * (4 + m) + j * (5 + 2 * m) + 29 * k + 7 * ((i * j) // 12) + 37 * m + SEED) % 256
    return torch.from_numpy(images.astype(np.uint8)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [32, 64, 256, 320])
def test_features_are_those_of_the_tensorflow_graph(network, side):
    images, index = golden_images(side), ARRAYS["resized_index"]
    resized = preprocess(images).permute(0, 2, 3, 1)[:, index][:, :, index]
    with exact_float32(torch.device("cpu")):
        pool, spatial = network(images)
        probabilities = network.probabilities(pool)
    np.testing.assert_allclose(resized, ARRAYS[f"resized_{side}"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(pool, ARRAYS[f"pool_{side}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(spatial, ARRAYS[f"spatial_{side}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(probabilities, ARRAYS[f"probs_{side}"], atol=1e-5, rtol=0)


def test_a_feature_does_not_depend_on_its_place_in_the_batch(network):
    images = torch.cat([golden_images(32), golden_images(32).flip(2)])
    with exact_float32(torch.device("cpu")):
        for forward, backward in zip(network(images), network(images.flip(0)), strict=True):
            assert torch.equal(forward, backward.flip(0))


def test_loading_draws_no_random_number(weights):
    state = torch.get_rng_state()
    network = load_inception(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_a_missing_file_names_the_right_one(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth does not exist; weights-inception-2015-12-05-6726825d\.pth"):
        load_inception(tmp_path / "none.pth")


def test_without_network_the_message_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match=r"no route to host.*get weights-inception.*96 MB.*put it at .*checkpoints"):
        load_inception()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_another_network_is_refused(weights, tmp_path, change):
    state = torch.load(weights, weights_only=True)
    if change == "missing":
        del state["fc.weight"]
    elif change == "extra":
        state["head.weight"] = torch.zeros(1)
    else:
        state["fc.weight"] = torch.zeros(1000, 2048)
    torch.save(state, tmp_path / "other.pth")
    key = "head.weight" if change == "extra" else "fc.weight"
    with pytest.raises(InputError, match=rf"is not weights-inception.*: {key}"):
        load_inception(tmp_path / "other.pth")


class Hostile:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickled_code_is_refused(tmp_path, capsys):
    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(InputError, match="only tensors"):
        load_inception(tmp_path / "hostile.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_torch_fidelity_reads_the_same_file_to_the_same_features(network, weights):
    """The graph whose published weights we load: its own class gives the pool features, and names the file."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    theirs = published.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    with exact_float32(torch.device("cpu")):
        torch.testing.assert_close(network(golden_images(64))[0], theirs(golden_images(64))[0], rtol=0, atol=1e-5)
    assert published.URL_INCEPTION_V3 == inception.URL
