"""The evaluator: the metrics of all samples, in any batches and order, undisturbed and undisturbing."""

import pytest
import torch

from evaluation.evaluator import Evaluator, FeatureStream, compare, kernel_subset_size
from evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from tests.support.evaluation_data import TinyInception, as_images, feature_set, random_images
from utils.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real():
    return random_images(120, 8, 1)


@pytest.fixture(scope="module")
def fake():
    return random_images(100, 8, 2)


def test_evaluator_gives_the_metrics_of_all_samples(real, fake):
    network = TinyInception()
    evaluator = Evaluator(network, feature_set(real, network), CPU, batch_size=32)
    for part in torch.randperm(100, generator=torch.Generator().manual_seed(0)).split(7):  # any batches, any order
        evaluator.add(as_images(fake)[part], part)
    found = evaluator.result()

    (pool_r, spatial_r), (pool_f, spatial_f) = (network(as_images(images)) for images in (real, fake))
    moments = [
        (features.double().mean(0), features.double().T.cov()) for features in (pool_f, pool_r, spatial_f, spatial_r)
    ]
    score = inception_score(network.probabilities(pool_f))
    precision, recall = precision_recall(pool_r, pool_f)
    precision_adm, recall_adm = precision_recall(pool_r, pool_f, half=True)
    kernel = kernel_distance(pool_f, pool_r, subset_size=50)  # the samples first, as torch-fidelity draws its subsets
    expected = {
        "fid": frechet_distance(*moments[0], *moments[1]),
        "sfid": frechet_distance(*moments[2], *moments[3]),
        "inception_score": score[0],
        "inception_score_std": score[1],
        "precision": precision,
        "recall": recall,
        "precision_adm": precision_adm,
        "recall_adm": recall_adm,
        "kid": kernel[0],
        "kid_std": kernel[1],
        "kid_subset_size": 50,
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["fid"] > 0.01 and 0 < found["recall"] < 1


def test_the_network_sees_batches_of_one_size(real):
    network = TinyInception()
    stream = FeatureStream(network, CPU, batch_size=32)
    for part in torch.arange(120).split(50):
        stream.add(as_images(real)[part], part)
    found = stream.finish()
    assert network.batches == [32] * 4
    assert found.count == 120 and found.features.shape == (120, 6)
    assert torch.equal(found.features, feature_set(real, TinyInception()).features)


def test_only_the_features_asked_for_are_kept(real):
    keep = torch.tensor([0, 3, 77, 119])
    stream = FeatureStream(TinyInception(), CPU, batch_size=16, keep=keep)
    stream.add(as_images(real), torch.arange(120))
    found = stream.finish()
    whole = feature_set(real, TinyInception(), 16)
    assert torch.equal(found.features, whole.features[keep])
    torch.testing.assert_close(found.pool, whole.pool, rtol=1e-12, atol=0)


def test_evaluation_disturbs_neither_random_state_nor_precision(real, fake):
    torch.backends.cudnn.allow_tf32 = True
    state = torch.get_rng_state()
    seen = []

    class Watching(TinyInception):
        def forward(self, images):
            backends = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), *backends))
            return super().forward(images)

    network = Watching()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluator = Evaluator(network, feature_set(real, network), CPU)
        evaluator.add(as_images(fake), torch.arange(100))
        evaluator.result()
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, False, False, False)}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.cudnn.allow_tf32


def test_features_that_are_not_finite_are_refused(real):
    network = TinyInception()
    network.maps[0, 0] = float("nan")
    with pytest.raises(InputError, match="features of some image are not finite"):
        feature_set(real, network)


def test_subsets_of_the_kernel_distance_are_never_a_whole_set():
    sizes = {(50000, 10000): 1000, (2000, 50000): 1000, (1999, 50000): 999, (1000, 1000): 500, (4, 10): 2}
    assert all(kernel_subset_size(*counts) == size for counts, size in sizes.items())


def test_few_images_are_warned_about_or_refused(real, caplog):
    network = TinyInception()
    few = feature_set(real[:6], network)
    compare(few, few, network, CPU)
    assert "samples: 6 images for 6 dimensions: the covariance is singular" in caplog.text
    assert "or take kid, which has no such bias" in caplog.text
    with pytest.raises(InputError, match="the samples: 3 images were given; precision and recall need more than 3"):
        compare(feature_set(real[:3], network), few, network, CPU)
    with pytest.raises(InputError, match="1 images were given"):
        feature_set(real[:1], network)
