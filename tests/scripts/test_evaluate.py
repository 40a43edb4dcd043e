"""evaluate.py: its numbers and files, reconstructions of one or two VAEs, and what bad input gets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.image_sources import ImageArray
from evaluation.evaluator import compare
from evaluation.features import exact_float32, load_features
from evaluation.metrics import inception_score
from evaluation.reconstruction import measure_reconstruction
from tests.support import small
from tests.support.evaluation_data import (
    as_images,
    encoder_folder,
    feature_set,
    inception_file,
    samples_file,
    small_vae,
)

CPU = torch.device("cpu")


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
    return numbers_of(json.loads(path.read_text()))


def numbers_of(contents: dict) -> dict:
    names = ("fd_", "fid", "sfid", "inception_s", "prec", "rec", "kd_enc", "kd_std", "kid")
    return {key: value for key, value in contents.items() if key.startswith(names)}


def test_the_numbers_are_printed_and_written(place, capsys):
    run("--samples", place / "samples.npz", "--reference", place / "real.npz", *space(place))
    found = numbers(place / "samples-vs-real-encoder-mean-tokens.json")
    assert list(found) == [f"{name}_encoder-mean-tokens" for name in ("fd", "precision", "recall", "kd", "kd_std")]
    network = load_features(space(place)[1], (16, 16))
    sets = [feature_set(np.load(place / name)["arr_0"], network) for name in ("samples.npz", "real.npz")]
    assert found | {"kd_subset_size": 20} == pytest.approx(compare(*sets, network, CPU), rel=1e-9)
    printed = capsys.readouterr().out
    assert all(f"{value:.6g}" in printed for value in found.values())


def test_statistics_saved_once_serve_as_reference(place, capsys):
    run("--reference", place / "real.npz", "--save-stats", place / "stats.npz", *space(place))
    for reference, output in (("real.npz", "direct.json"), ("stats.npz", "saved.json")):
        sets = small.argv(samples=place / "samples.npz", reference=place / reference)
        run(*sets, *space(place), "--output", place / output, "--batch-size", 7)
    assert numbers(place / "saved.json") == pytest.approx(numbers(place / "direct.json"), rel=1e-9)
    with pytest.raises(SystemExit):
        run("--reference", place / "real.npz", "--save-stats", place / "stats.npz", *space(place))
    assert "--save-stats" in capsys.readouterr().err


def test_inception_gives_the_metrics_of_its_features(place):
    """The real graph on a few images, against the metrics of its features taken directly."""
    weights = inception_file(place)
    for name, seed in (("few", 5), ("others", 6)):
        samples_file(place / f"{name}.npz", 6, 24, seed)
    sets = small.argv(samples=place / "few.npz", reference=place / "others.npz")
    run(*sets, "--inception-weights", weights, "--batch-size", 3)
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
    assert len(found) == 11 and found["kid_subset_size"] == 3


def measured(place: Path, samples, *more) -> dict:
    sets = small.argv(samples=samples, reference=place / "real.npz", output=place / "measured.json")
    run(*sets, *space(place), *more)
    return json.loads((place / "measured.json").read_text())


def test_every_form_of_a_set_gives_its_numbers(place):
    images = np.load(place / "samples.npz")["arr_0"]
    expected = numbers_of(measured(place, place / "samples.npz"))
    np.save(place / "set.npy", images)
    assert numbers_of(measured(place, place / "set.npy")) == expected
    for name, (array, given) in {
        "unit.npz": ((images / 255).astype(np.float32), "0,1"),
        "signed.npz": (images / 127.5 - 1, "-1,1"),
    }.items():
        np.savez(place / name, arr_0=array)
        found = measured(place, place / name, "--samples-range", given)
        assert numbers_of(found) == expected
        assert found["notes"] == [
            f"{place / name}: {array.dtype} values from {given[:-2]} to 1 are rounded to levels 0..255"
        ]


def test_linked_folders_are_read_and_what_is_left_out_is_recorded(place, capsys, caplog):
    images = np.load(place / "samples.npz")["arr_0"]
    for i, image in enumerate(images):
        folder = place / ("elsewhere" if i % 2 else "tree") / "class"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.{'bmp' if i % 3 else 'tif'}")
    (place / "tree" / "linked").symlink_to(place / "elsewhere" / "class")
    (place / "tree" / "class" / "notes.txt").write_text("no image")
    found = measured(place, place / "tree")
    assert found["count"] == 40 and found["fd_encoder-mean-tokens"] == pytest.approx(
        measured(place, place / "samples.npz")["fd_encoder-mean-tokens"], rel=1e-9
    )
    assert found["notes"] == [f"{place / 'tree'}: left out 1 .txt"] and found["notes"][0] in caplog.text


def test_images_that_exif_asks_to_turn_are_counted(place, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    (place / "turned").mkdir()
    for i, image in enumerate(np.load(place / "samples.npz")["arr_0"]):
        options = {"exif": exif} if i < 7 else {}
        Image.fromarray(image).save(place / "turned" / f"{i}.png", **options)
    said = f"{place / 'turned'}: 7 images ask by EXIF to be turned; they were read as they lie"
    assert measured(place, place / "turned")["notes"] == [said] and said in caplog.text


def bad(place: Path, name: str, array: np.ndarray) -> str:
    np.savez(place / name, arr_0=array)
    return str(place / name)


IMAGES = np.full((8, 16, 16, 3), 128, np.uint8)
BAD_SAMPLES = {
    "missing": (None, "none.npz does not exist"),
    "float": (IMAGES / 255.0, "arr_0 is float64 (8, 16, 16, 3); "),
    "float, unsaid": (IMAGES / 255.0, "or floats and evaluate.py's --samples-range 0,1 or -1,1"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "arr_0 is uint8 (8, 3, 16, 16)"),
    "one image": (IMAGES[0], "arr_0 is uint8 (16, 16, 3)"),
    "alpha": (IMAGES[..., [0, 0, 0, 0]], "arr_0 is uint8 (8, 16, 16, 4)"),
    "16 bit": (IMAGES.astype(np.uint16), "arr_0 is uint16 (8, 16, 16, 3)"),
    "bool": (IMAGES > 0, "arr_0 is bool (8, 16, 16, 3)"),
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
    ([*GOOD, "--samples-range", "-1,1"], "--samples-range: -1,1 was given, but no images are floats"),
    ([*GOOD, "--samples-range", "0,255"], "--samples-range: invalid choice: '0,255'"),
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


# Reconstructions


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    for name, seed in (("before", 0), ("after", 1)):
        small_vae(seed).save_pretrained(folder / name)
    samples_file(folder / "images.npz", 24, 16, 3)
    encoder_folder(folder / "encoder")
    return folder


def reconstruction_flags(vaes: Path, *arguments) -> list[str]:
    both = dict(reconstruct=True, vae_ckpt=[vaes / "before", vaes / "after"], data_dir=vaes / "images.npz")
    fixed = small.argv(**both, lpips=False, features=f"timm:local-dir:{vaes / 'encoder'}")
    return [*fixed, *map(str, arguments)]


def reconstruct(vaes: Path, *arguments) -> dict:
    evaluate.main(reconstruction_flags(vaes, *arguments))
    return json.loads((vaes / "after-reconstruction.json").read_text())


def test_two_vaes_are_compared(vaes, capsys):
    found = reconstruct(vaes)
    assert list(found["results"]) == ["before", "after"] and found["count"] == 24
    vae, source = small_vae(1), ImageArray(np.load(vaes / "images.npz")["arr_0"], "images")
    expected = measure_reconstruction(vae, source, CPU)
    assert {key: found["results"]["after"][key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert found["results"]["after"]["rfd_encoder-mean-tokens"] > 0
    assert Image.open(vaes / "after-reconstruction.png").size == (8 * 96, 7 * (20 + 96))
    assert "before (24 images)" in capsys.readouterr().out


def test_images_that_exif_asks_to_turn_are_counted_once_whatever_is_measured(vaes, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    (vaes / "turned").mkdir()
    for i, image in enumerate(np.load(vaes / "images.npz")["arr_0"]):
        Image.fromarray(image).save(vaes / "turned" / f"{i:02}.png", **({"exif": exif} if i < 5 else {}))
    said = f"{vaes / 'turned'}: 5 images ask by EXIF to be turned; they were read as they lie"
    for features in ([], ["--features", "none"]):
        caplog.clear()
        assert reconstruct(vaes, "--data-dir", vaes / "turned", *features)["notes"] == [said]
        assert caplog.text.count(said) == 1


def test_max_images_takes_so_many(vaes):
    assert reconstruct(vaes, "--max-images", 10, "--num-picture", 0)["count"] == 10


def test_images_that_a_vae_cannot_take_are_refused(vaes, capsys):
    samples_file(vaes / "odd.npz", 8, 18, 0)
    with pytest.raises(SystemExit) as leaving:
        reconstruct(vaes, "--data-dir", vaes / "odd.npz")
    assert leaving.value.code == 2
    assert "--data-dir: " in (line := capsys.readouterr().err) and "18 x 18 images; multiples of 4, 11 at least" in line
