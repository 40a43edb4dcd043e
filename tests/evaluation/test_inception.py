"""Inception-v3 against the graph of ADM's suite (golden values under seeded weights), and its weights file."""

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

from evaluation import inception
from evaluation.features import exact_float32, probe, same_network
from evaluation.inception import fold_batch_norms, load_inception
from tests.support.evaluation_data import check_inception, golden_images, inception_file
from utils.errors import InputError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return inception_file(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


@pytest.mark.parametrize("side", [32, 64, 256, 320])
def test_features_are_those_of_the_tensorflow_graph(network, side):
    check_inception(network, side)


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


@pytest.fixture(scope="module")
def published(weights):
    """torch-fidelity's own class, whose published weights we load, with its BatchNorms as they are."""
    return feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "published", ["2048"], feature_extractor_weights_path=str(weights)
    )


def test_torch_fidelity_reads_the_same_file_to_the_same_features(network, published):
    """Its own class gives the pool features, and names the file."""
    with exact_float32(torch.device("cpu")):
        torch.testing.assert_close(network(golden_images(64))[0], published(golden_images(64))[0], rtol=0, atol=1e-5)
    assert feature_extractor_inceptionv3.URL_INCEPTION_V3 == inception.URL


def test_references_made_before_the_norms_were_folded_are_of_the_same_network(network, published):
    """Their file holds a probe of the unfolded network; `same_network` would refuse a file of other weights."""
    cpu = torch.device("cpu")
    assert same_network(probe(published, (64, 64), cpu), probe(network, (64, 64), cpu))


def test_a_folded_norm_scales_and_shifts_as_before():
    """With a scale of its own, which Inception's norms lack, and a variance beside which eps = 0.001 counts."""
    block = feature_extractor_inceptionv3.BasicConv2d(3, 8, kernel_size=3).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for tensor in (block.bn.weight, block.bn.bias, block.bn.running_mean, block.bn.running_var):
        tensor.copy_(0.01 * torch.rand(8, generator=random))
    x = torch.randn(2, 3, 9, 9, generator=random)
    expected = block(x)
    folded = fold_batch_norms(nn.Sequential(block))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert list(folded.state_dict()) == ["0.conv.weight", "0.conv.bias"]
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-7)
