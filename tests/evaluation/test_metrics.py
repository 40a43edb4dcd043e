"""The metrics against ADM's evaluation suite (golden values), closed forms and brute force."""

import itertools
import json
import math
import threading

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation import metrics
from evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
)
from tests.support.golden_data import GOLDEN, load

ARRAYS, _ = load("evaluation/metrics")
EXPECTED = json.loads((GOLDEN / "evaluation/expected.json").read_text())


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def lowrank(z: np.ndarray) -> torch.Tensor:
    product = z.astype(np.int64) @ ARRAYS["lowrank_w"].astype(np.int64) + ARRAYS["lowrank_offset"]
    return tensor(product) / 64


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "lowrank":
        return lowrank(ARRAYS["lowrank_z_real"]), lowrank(ARRAYS["lowrank_z_fake"])
    return tensor(ARRAYS[f"{name}_real"]), tensor(ARRAYS[f"{name}_fake"])


def moments(features: torch.Tensor, batch: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = Statistics(features.shape[1])
    for part in features.split(batch):
        statistics.add(part)
    return statistics.moments()


def random_covariance(dim: int, seed: int) -> torch.Tensor:
    root = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / dim


# Statistics and the Frechet distance


@pytest.mark.parametrize("name, near_theirs", [("cluster", 1e-5), ("lattice", 1e-5), ("lowrank", 5e-5)])
def test_frechet_distance_is_that_of_the_adm_suite(name, near_theirs):
    """`fid` carries the suite's own error (a float32 mean; `sqrtm` of a singular matrix), `fid_float64` does not."""
    real, fake = case(name)
    distance = frechet_distance(*moments(fake), *moments(real))
    assert distance == pytest.approx(EXPECTED[name]["fid_float64"], rel=1e-9)
    assert distance == pytest.approx(EXPECTED[name]["fid"], rel=near_theirs)


def test_sfid_flattens_height_width_channel():
    def features(array, order):
        return tensor(array[:, :7].transpose(order).reshape(len(array), -1)) / 8

    stored = torch.from_numpy(ARRAYS["spatial_real_mu"]), torch.from_numpy(ARRAYS["spatial_real_sigma"])
    real, fake = ARRAYS["spatial_real_nchw"], ARRAYS["spatial_fake_nchw"]
    right, wrong = (moments(features(fake, order)) for order in ((0, 2, 3, 1), (0, 1, 2, 3)))
    expected = EXPECTED["spatial"]
    assert frechet_distance(*right, *stored) == pytest.approx(expected["sfid_float64"], rel=1e-6)
    assert frechet_distance(*right, *moments(features(real, (0, 2, 3, 1)))) == pytest.approx(
        expected["sfid_float64"], rel=1e-6
    )
    assert frechet_distance(*wrong, *stored) == pytest.approx(expected["sfid_if_channel_first_flattening"], rel=1e-6)


@pytest.mark.parametrize("stripe", [2, 5, 512])
def test_statistics_are_those_of_numpy_and_add_up_over_processes(stripe, monkeypatch):
    monkeypatch.setattr(metrics, "STRIPE", stripe)
    features = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) + 3
    parts = [Statistics(5) for _ in range(2)]
    parts[0].add(features[:30])
    parts[1].add(features[30:])
    for mine, other in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        mine += other
    mean, covariance = parts[0].moments()
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-11)


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    variances = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 1.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, -1.0]], dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    found = frechet_distance(means[0], variances[0].diag(), means[1], variances[1].diag())
    assert found == pytest.approx(expected.item(), rel=1e-14)


def test_frechet_distance_is_the_matrix_square_root():
    a, b, mean = random_covariance(40, 1), random_covariance(40, 2), torch.zeros(40)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    assert frechet_distance(mean, a, mean, b) == pytest.approx((a + b).trace().item() - 2 * np.trace(root), rel=1e-10)


@pytest.mark.parametrize("rank_1, rank_2", [(3, 40), (40, 3), (3, 5), (0, 40), (0, 0)])
def test_frechet_distance_of_singular_covariances_is_the_closed_form(rank_1, rank_2):
    """Gaussians in two subspaces: a rotation into the first `rank` axes makes the closed form."""
    rotation = torch.linalg.qr(random_covariance(40, 3)).Q
    variances = [torch.tensor([float(i < rank) for i in range(40)], dtype=torch.float64) for rank in (rank_1, rank_2)]
    covariances = [rotation @ variance.diag() @ rotation.T for variance in variances]
    mean = torch.zeros(40)
    found = frechet_distance(mean, covariances[0], mean, covariances[1])
    assert found == pytest.approx(abs(rank_1 - rank_2), abs=1e-12)


def test_frechet_distance_is_symmetric_and_zero_for_equals():
    a, b = (random_covariance(30, seed) for seed in (4, 5))
    mean = torch.arange(30.0)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mean, a, -mean, b) == pytest.approx(frechet_distance(-mean, b, mean, a), rel=1e-12)


# Inception Score


@pytest.mark.parametrize(
    "key, rows, split",
    [
        ("n1200_split5000", slice(None), 5000),
        ("n1200_split500", slice(None), 500),
        ("n1200_split500_permuted", ARRAYS["is_perm"].astype(int), 500),
        ("n1000_split500", slice(1000), 500),
    ],
)
def test_inception_score_is_that_of_the_adm_suite(key, rows, split):
    score, _ = inception_score(tensor(ARRAYS["is_probs"][rows]), split)
    assert score == pytest.approx(EXPECTED["inception_score"][key], rel=2e-5)


@pytest.mark.parametrize("split", [5000, 100])
def test_inception_score_of_features_is_that_of_the_adm_suite(split):
    probabilities = (tensor(ARRAYS["cluster_fake"]) @ tensor(ARRAYS["is_weight"])).softmax(1)
    expected = EXPECTED["inception_score"][f"cluster_fake_features_split{split}"]
    assert inception_score(probabilities, split)[0] == pytest.approx(expected, rel=2e-5)


def test_inception_score_of_certain_and_of_uniform_predictions_is_known():
    assert inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx((10, 0))  # p = 0 contributes 0, not NaN
    assert inception_score(torch.full((20, 10), 0.1)) == pytest.approx((1, 0))
    halves = torch.cat([torch.eye(10), torch.full((10, 10), 0.1)])
    assert inception_score(halves, 10) == pytest.approx((5.5, 4.5))  # blocks of 10 and 1, population deviation


# Precision and recall


@pytest.mark.parametrize("name", ["cluster", "lattice", "lowrank"])
@pytest.mark.parametrize("block, rows", [(10000, 2000), (130, 50)])
def test_precision_recall_in_float32_is_exact(name, block, rows, monkeypatch):
    monkeypatch.setattr(metrics, "ADM_BLOCK", block)
    monkeypatch.setattr(metrics, "ROWS", rows)
    expected = EXPECTED[name]
    found = precision_recall(*case(name))
    assert found == (expected["precision_float64"], expected["recall_float64"])


@pytest.mark.parametrize("name, slack", [("cluster", 3), ("lattice", 0), ("lowrank", 3)])
def test_precision_recall_in_half_precision_is_that_of_the_adm_suite(name, slack):
    real, fake = case(name)
    precision, recall = precision_recall(real, fake, half=True)
    suffix = "" if name == "lattice" else "_half"
    assert abs(precision - EXPECTED[name][f"precision{suffix}"]) <= slack / len(fake) + 1e-12
    assert abs(recall - EXPECTED[name][f"recall{suffix}"]) <= slack / len(real) + 1e-12


@pytest.mark.parametrize("name, scale", [("cluster", 256), ("lowrank", 64)])
def test_half_precision_falls_back_where_it_overflows(name, scale):
    real, fake = case(name)
    expected = EXPECTED[name]
    assert precision_recall(real * scale, fake * scale, half=True) == (
        expected["precision_single"],
        expected["recall_single"],
    )


def test_overflow_is_decided_block_by_block(monkeypatch):
    """One far point makes its own blocks single precision; the rest stays half, as the counts of rounded terms show."""
    monkeypatch.setattr(metrics, "ADM_BLOCK", 100)
    points = metrics._Points(torch.cat([torch.ones(150, 4), torch.full((50, 4), 200.0)]), half=True)
    blocks = [slice(0, 100), slice(100, 200)]
    fits = [metrics._fits_half(points, points, a, b) for a, b in itertools.product(blocks, blocks)]
    assert fits == [True, False, False, False]


def test_precision_recall_are_those_of_brute_force():
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(60, 3, generator=generator), torch.randn(50, 3, generator=generator) + 1
    distances = [[torch.cdist(a.double(), b.double()) for b in (real, fake)] for a in (real, fake)]
    radii = [distances[i][i].sort(1)[0][:, 3] for i in (0, 1)]
    precision = (distances[0][1] <= radii[0][:, None]).any(0).double().mean()
    recall = (distances[0][1] <= radii[1]).any(1).double().mean()
    assert 0 < recall < precision < 1
    assert precision_recall(real, fake) == (precision, recall)


@pytest.mark.parametrize("half", [False, True])
def test_precision_recall_is_the_same_on_several_processes(half, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 90)
    real, fake = case("cluster")
    world, barrier, mailbox, found = 3, threading.Barrier(3), {}, {}

    def process(rank: int) -> None:
        def all_reduce(tensor: torch.Tensor) -> None:
            mailbox[rank] = tensor
            barrier.wait()
            total = sum(mailbox[other].double() for other in range(world))
            barrier.wait()
            tensor.copy_(total)

        found[rank] = precision_recall(real, fake, half=half, rank=rank, world_size=world, all_reduce=all_reduce)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(world), precision_recall(real, fake, half=half))


# Images


def test_psnr_of_a_known_error_is_known():
    images = torch.zeros(3, 3, 8, 8)
    other = images.clone()
    other[1] += 0.1
    other[2, 0] += 0.1  # a third of the squared error
    expected = [metrics.PSNR_CEILING, 20.0, 20 + 10 * math.log10(3)]
    np.testing.assert_allclose(psnr(other, images), expected, rtol=1e-6)


def test_ssim_of_constant_images_is_the_luminance_term():
    """Without variance only the luminance term is left."""
    a, b = 0.25, 0.75
    images = torch.full((1, 3, 16, 12), a), torch.full((1, 3, 16, 12), b)
    expected = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    assert ssim(*images).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 13, 12, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / np.outer(bell, bell).sum()
    expected = []
    for image in range(2):
        values = []
        for channel, top, left in itertools.product(range(3), range(3), range(2)):
            u, v = (t[image, channel, top : top + 11, left : left + 11].double().numpy() for t in (x, y))
            mean_u, mean_v = (weights * u).sum(), (weights * v).sum()
            var_u, var_v = (weights * (u - mean_u) ** 2).sum(), (weights * (v - mean_v) ** 2).sum()
            covariance = (weights * (u - mean_u) * (v - mean_v)).sum()
            values.append(
                (2 * mean_u * mean_v + 1e-4)
                * (2 * covariance + 9e-4)
                / ((mean_u**2 + mean_v**2 + 1e-4) * (var_u + var_v + 9e-4))
            )
        expected.append(np.mean(values))
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-12)


# Kernel distance


def test_kernel_distance_is_torch_fidelitys():
    from torch_fidelity.defaults import DEFAULTS
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(90, 16, generator=generator)
    y = torch.rand(70, 16, generator=generator) * 1.1
    options = DEFAULTS | {"kid_subset_size": 40, "verbose": False}
    theirs = kid_features_to_metric(x.double(), y.double(), **options)
    mean, deviation = kernel_distance(x, y, subset_size=40)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    assert mean > 3 * deviation / 10  # of 100 pairs: they are told apart


def test_kernel_distance_has_no_bias_from_few_images():
    """Two sets of one distribution: 0 on average, for any size, where the Frechet distance grows."""
    generator = torch.Generator().manual_seed(1)
    values = [
        kernel_distance(*torch.randn(2, 12, 8, generator=generator), subset_size=12, subsets=1)[0] for _ in range(400)
    ]
    values = torch.tensor(values, dtype=torch.float64)
    assert abs(values.mean()) < 3 * values.std() / 20


def test_kernel_distance_by_hand():
    """(x.y / D + 1)^3 over the pairs of two sets of two points, all of them in the one subset there is."""
    x, y = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [2, 2]])
    within_x, within_y = 1.0, 27.0  # x1.x2 = 0; y1.y2 = 4
    between = (2.0**3 + 2.0**3 + 1.0**3 + 2.0**3) / 4  # x1.y1 = 2, x1.y2 = 2, x2.y1 = 0, x2.y2 = 2
    expected = within_x + within_y - 2 * between
    assert kernel_distance(x, y, subset_size=2, subsets=3) == pytest.approx((expected, 0.0))


def test_kernel_distance_is_shared_out_to_processes():
    x, y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(2))
    whole = kernel_distance(x, y, subset_size=10, subsets=7)
    parts = []
    for rank in range(3):
        kernel_distance(
            x, y, subset_size=10, subsets=7, rank=rank, world_size=3, all_reduce=lambda v: parts.append(v.clone())
        )
    values = sum(parts)
    assert (values.mean().item(), values.std(correction=0).item()) == pytest.approx(whole, rel=1e-12)
