"""Evaluation end to end: one set of images gives the same numbers however it is cut, read or shared among processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
from dataset.image_sources import ImageArray
from evaluation.evaluator import Evaluator, FeatureSet, FeatureStream, compare, extract
from evaluation.features import exact_float32, load_features
from evaluation.metrics import frechet_distance, inception_score, precision_recall
from evaluation.reference import read_reference, save_reference
from tests.support.evaluation_data import (
    TinyInception,
    as_images,
    encoder_folder,
    inception_file,
    random_images,
    samples_file,
)
from utils.errors import InputError

CPU = torch.device("cpu")


def feature_set(images: np.ndarray, network: nn.Module, batch_size: int = 32) -> FeatureSet:
    return extract(ImageArray(images, "array"), network, CPU, batch_size=batch_size)


@pytest.fixture(scope="module")
def real():
    return random_images(120, 8, 1)


@pytest.fixture(scope="module")
def fake():
    return random_images(100, 8, 2)


# The evaluator


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
    expected = {
        "fid": frechet_distance(*moments[0], *moments[1]),
        "sfid": frechet_distance(*moments[2], *moments[3]),
        "inception_score": score[0],
        "inception_score_std": score[1],
        "precision": precision,
        "recall": recall,
        "precision_adm": precision_adm,
        "recall_adm": recall_adm,
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


def test_few_images_are_warned_about_or_refused(real, caplog):
    network = TinyInception()
    few = feature_set(real[:6], network)
    compare(few, few, network, CPU)
    assert "samples: 6 images for 6 dimensions: the covariance is singular" in caplog.text
    with pytest.raises(InputError, match="the samples: 3 images were given; precision and recall need more than 3"):
        compare(feature_set(real[:3], network), few, network, CPU)
    with pytest.raises(InputError, match="1 images were given"):
        feature_set(real[:1], network)


# References


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


# The script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    samples_file(folder / "samples.npz", 40, 16, 1)
    samples_file(folder / "real.npz", 50, 16, 2)
    encoder_folder(folder / "encoder")
    return folder


def run(*arguments) -> None:
    evaluate.main([str(argument) for argument in arguments])


def space(place: Path) -> list[str]:
    return ["--features", f"timm:local-dir:{place / 'encoder'}"]


def numbers(path: Path) -> dict:
    contents = json.loads(path.read_text())
    return {
        key: contents[key] for key in contents if key.startswith(("fd_", "fid", "sfid", "inception_s", "prec", "rec"))
    }


def test_script_prints_and_writes_the_numbers(place, capsys):
    run("--samples", place / "samples.npz", "--reference", place / "real.npz", *space(place))
    found = numbers(place / "samples-vs-real-encoder-mean-tokens.json")
    assert list(found) == [f"{name}_encoder-mean-tokens" for name in ("fd", "precision", "recall")]
    network = load_features(space(place)[1], (16, 16))
    sets = [feature_set(np.load(place / name)["arr_0"], network) for name in ("samples.npz", "real.npz")]
    assert found == pytest.approx(compare(*sets, network, CPU), rel=1e-9)
    printed = capsys.readouterr().out
    assert all(f"{value:.6g}" in printed for value in found.values())


def test_statistics_saved_once_serve_as_reference(place, capsys):
    run("--reference", place / "real.npz", "--save-stats", place / "stats.npz", *space(place))
    for reference, output in (("real.npz", "direct.json"), ("stats.npz", "saved.json")):
        run(
            "--samples",
            place / "samples.npz",
            "--reference",
            place / reference,
            *space(place),
            "--output",
            place / output,
            "--batch-size",
            7,
        )
    assert numbers(place / "saved.json") == pytest.approx(numbers(place / "direct.json"), rel=1e-9)
    with pytest.raises(SystemExit):
        run("--reference", place / "real.npz", "--save-stats", place / "stats.npz", *space(place))
    assert "--save-stats" in capsys.readouterr().err


def test_script_with_inception(place):
    """The real graph on a few images, against the metrics of its features taken directly."""
    weights = inception_file(place)
    for name, seed in (("few", 5), ("others", 6)):
        samples_file(place / f"{name}.npz", 6, 24, seed)
    run(
        "--samples",
        place / "few.npz",
        "--reference",
        place / "others.npz",
        "--inception-weights",
        weights,
        "--batch-size",
        3,
    )
    found = numbers(place / "few-vs-others-inception.json")
    network = load_features("inception", (24, 24), weights=weights)
    with exact_float32(CPU):
        pool = [network(as_images(np.load(place / f"{name}.npz")["arr_0"]))[0] for name in ("few", "others")]
    # Both covariances have rank 5: the singular values of the centred cross product, not of 2048 x 2048 matrices.
    centred = [features.double() - features.double().mean(0) for features in pool]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 5
    traces = sum(features.square().sum() / 5 for features in centred)
    fid = (pool[0].double().mean(0) - pool[1].double().mean(0)).square().sum() + traces - 2 * root
    assert found["fid"] == pytest.approx(fid.item(), rel=1e-6)
    assert found["inception_score"] == pytest.approx(inception_score(network.probabilities(pool[0]))[0], rel=1e-6)
    assert len(found) == 8


def bad(place: Path, name: str, array: np.ndarray) -> str:
    np.savez(place / name, arr_0=array)
    return str(place / name)


IMAGES = np.full((8, 16, 16, 3), 128, np.uint8)
BAD_SAMPLES = {
    "missing": (None, "none.npz does not exist"),
    "float": (IMAGES / 255.0, "arr_0 is float64 (8, 16, 16, 3)"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "arr_0 is uint8 (8, 3, 16, 16)"),
    "grey": (IMAGES[..., 0], "arr_0 is uint8 (8, 16, 16)"),
    "empty": (IMAGES[:0], "arr_0 is uint8 (0, 16, 16, 3)"),
    "range": (IMAGES // 128, "holds only 0 and 1"),
    "pickled": (np.array([{}], dtype=object), "pickled objects, which are never loaded"),
    "resolution": (np.full((8, 32, 32, 3), 9, np.uint8), "has 16 x 16 images; 32 x 32 is needed"),
    "count": (IMAGES[:2], "bad-count.npz: 2 images were given; precision and recall need more than 3"),
}


@pytest.mark.parametrize("fault", BAD_SAMPLES)
def test_bad_samples_are_one_line(place, capsys, fault):
    array, message = BAD_SAMPLES[fault]
    samples = "none.npz" if array is None else bad(place, f"bad-{fault}.npz", array)
    before = set(place.iterdir())
    with pytest.raises(SystemExit) as leaving:
        run("--samples", samples, "--reference", place / "real.npz", *space(place))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert leaving.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert set(place.iterdir()) == before


def test_a_reference_of_too_few_images_is_refused_before_any_work(place, capsys):
    few = bad(place, "few.npz", IMAGES[:3])
    with pytest.raises(SystemExit) as leaving:
        run("--samples", place / "samples.npz", "--reference", few, *space(place))
    errors = capsys.readouterr().err
    assert leaving.value.code == 2 and f"--reference: {few}: 3 images were given" in errors and "images/s" not in errors


GOOD = ["--samples", "{}/samples.npz", "--reference", "{}/real.npz"]
WRONG_FLAGS = [
    ([], "--reference is needed"),
    (["--samples", "s.npz"], "--reference is needed"),
    ([*GOOD[:3], "{}/none"], "--reference: {}/none does not exist"),
    ([*GOOD, "--features", "resnet"], "--features: 'resnet' was given; choose from inception, "),
    ([*GOOD, "--features", "none"], "--features: 'none'"),
    ([*GOOD, "--features", "timm:local-dir:x"], "--features: "),
    ([*GOOD, "--enc-ckpt", "e"], "--enc-ckpt: e was given, but --features inception"),
    ([*GOOD, "--features", "dinov2-vit-l", "--enc-ckpt", "x"], "--enc-ckpt: x does not exist"),
    ([*GOOD, "--inception-weights", "x.pth"], "--inception-weights: x.pth does not exist; weights-inception"),
    ([*GOOD, "--max-images", "10"], "--max-images: 10 was given; it goes with --reconstruct"),
    ([*GOOD, "--no-lpips"], "--lpips: False was given; it goes with --reconstruct"),
    ([*GOOD, "--output", "x.png"], "--output: x.png was given; a name that ends with .json is needed"),
    ([*GOOD, "--output", "{}/real.npz/x.json"], "--output: {}/real.npz is no folder that can be written"),
    ([*GOOD, "--save-stats", "x"], "--save-stats: x was given; a name that ends with .npz is needed"),
    (
        [*GOOD[2:], "--save-stats", "{}/real.npz", "--overwrite"],
        "--save-stats: {}/real.npz is the --reference itself; another name is needed",
    ),
    (["--reconstruct", "--vae-ckpt", "a", *GOOD[:2]], "--samples: {}/samples.npz was given; it does not go with"),
    (["--reconstruct", "--vae-ckpt", "a", "--no-lpips", "--lpips-weights", "w"], "--lpips-weights: w was given, but"),
    (["--reconstruct"], "--vae-ckpt: 0 VAEs were given"),
    (["--reconstruct", "--vae-ckpt", "a", "b", "c"], "--vae-ckpt: 3 VAEs were given"),
    (["--reconstruct", "--vae-ckpt", "a", "b", "--vae", "f8d4", "f8d4", "auto"], "--vae: 3 names were given"),
    (["--reconstruct", "--vae-ckpt", "a", "--data-dir", "{}/none"], "--data-dir: {}/none does not exist"),
    (
        ["--reconstruct", "--vae-ckpt", "{}/none.pt", "--data-dir", "{}/real.npz"],
        "--vae-ckpt: {}/none.pt does not exist",
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG_FLAGS)
def test_wrong_flags_are_one_line(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as leaving:
        run(*(argument.replace("{}", str(place)) for argument in arguments))
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2 and len(lines) == 1
    assert message.replace("{}", str(place)) in lines[0]
