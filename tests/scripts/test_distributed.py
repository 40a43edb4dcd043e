"""Two processes do what one does: the same draws and data, equal gradients on both, losses equal up to rounding."""

import json
import shutil

import numpy as np
import pytest
import torch

import cache_latents
import evaluate
import train_ldm_only
import train_repae
import train_vae
from tests.support import small
from tests.support.evaluation_data import encoder_folder, few_sampling_steps, random_images, samples_file, small_vae
from tests.support.processes import assert_draws_and_data_of_one, assert_equal_on_both, run_on_two
from tests.support.workers.distributed import evaluate_images, latents, normalise
from tests.support.workers.recorder import recording
from utils.images import save_png

SCRIPTS = {"train_repae": train_repae, "train_ldm_only": train_ldm_only, "train_vae": train_vae}
PER_PROCESS_NORM = ("d_loss", "logits_real", "logits_fake", "lecam_loss", "grad_norm_disc")  # of the discriminator


@pytest.fixture(scope="module")
def inputs(place, tmp_path_factory):
    """What the jobs read beside `place`."""
    folder = tmp_path_factory.mktemp("inputs")
    small.write_loss_config(folder / "loss.yaml", discriminator_weight=0)
    shutil.copy(place.vae, folder / "bare.pt")  # without statistics, so that these are measured
    meta = dict(format=1, features="inception", size=[24, 24], count=20, source="")
    np.savez(folder / "other-space.npz", mu=np.zeros(2048), sigma=np.eye(2048), meta=np.array(json.dumps(meta)))
    for i, image in enumerate(random_images(8, 24, 0)):
        save_png(image, folder / "damaged" / f"{i}.png")
    (folder / "damaged" / "5.png").write_bytes(b"no image")
    for name, count, seed in (("samples", 40, 1), ("real", 50, 2), ("images", 24, 3)):
        samples_file(folder / f"{name}.npz", count, 16, seed)
    encoder_folder(folder / "encoder")
    for name, seed in (("before", 0), ("after", 1)):
        small_vae(seed).save_pretrained(folder / name)
    return folder


def training_jobs(place, inputs, output) -> dict[str, tuple[str, list[str]]]:
    """{job: (script, argv)} of a run of each training script."""
    rates = dict(vae_learning_rate=1e-5, disc_learning_rate=3e-5)
    common = dict(loss_cfg_path=inputs / "loss.yaml", max_train_steps=3, checkpointing_steps=3, **rates)
    jointly = dict(learning_rate=1e-4, vae_ckpt=inputs / "bare.pt", gradient_accumulation_steps=2, num_preview=2)
    jointly |= dict(grad_checkpoint="vae,sit")  # whose recomputation must not upset the averaging of gradients
    online = dict(eval_steps=3, eval_reference=place.data, eval_samples=70, eval_features=place.encoder)
    return {
        "train_repae": ("train_repae", small.repae_options(place, output, "train_repae", **common, **jointly)),
        "train_ldm_only": (
            "train_ldm_only",
            small.ldm_options(place, output, "train_ldm_only", max_train_steps=3, **online),
        ),
        "train_vae": ("train_vae", small.vae_options(place, output, "train_vae", **common)),
    }


def other_jobs(place, inputs, output, *, batch_sizes=(32, 32)) -> dict[str, tuple[str, list[str]]]:
    """{job: (script, argv)} of the other scripts' jobs; the batch sizes are those of evaluate.py."""
    features, (of_samples, of_images) = f"timm:local-dir:{inputs / 'encoder'}", batch_sizes
    cache = small.cache_options(place, "cache", output_dir=output, vae_ckpt_path=inputs / "bare.pt")
    sets = dict(samples=inputs / "samples.npz", reference=inputs / "real.npz", features=features)
    evaluation = small.argv(**sets, batch_size=of_samples, output=output / "evaluate.json")
    images = dict(reconstruct=True, vae_ckpt=[inputs / "before", inputs / "after"], data_dir=inputs / "images.npz")
    images |= dict(lpips=False, features=features, batch_size=of_images)
    reconstruction = small.argv(**images, output=output / "reconstruct.json")
    return {
        "cache": ("cache_latents", cache),
        "evaluate": ("evaluate", evaluation),
        "reconstruct": ("evaluate", reconstruction),
    }


def refused_jobs(place, inputs, output) -> dict[str, tuple[str, list[str]]]:
    """{job: (script, argv)} of jobs with bad input; the last one meets it on one process alone."""
    none = inputs / "none"
    online = dict(eval_steps=3, eval_features=place.encoder)
    damaged = dict(samples=inputs / "damaged", reference=place.data, features=place.encoder, batch_size=4)
    return {
        "odd batch": ("train_ldm_only", small.ldm_options(place, output, "refused", batch_size=9)),
        "no data": ("train_repae", small.repae_options(place, output, "refused", data_dir=none)),
        "no reference": ("train_repae", small.repae_options(place, output, "refused", **online, eval_reference=none)),
        "other statistics": (
            "train_ldm_only",
            small.ldm_options(place, output, "refused", **online, eval_reference=inputs / "other-space.npz"),
        ),
        "damaged image": ("evaluate", small.argv(**damaged, output=output / "damaged.json")),
    }


@pytest.fixture(scope="module")
def two(place, inputs, tmp_path_factory):
    """(output folder, what process 0 saw, what process 1 saw) of one start under torchrun."""
    folder = tmp_path_factory.mktemp("two")
    output = folder / "exps"
    jobs = training_jobs(place, inputs, output) | other_jobs(place, inputs, output, batch_sizes=(8, 5))
    refused = refused_jobs(place, inputs, output)
    return output, *run_on_two(folder, jobs | refused)


@pytest.fixture(scope="module")
def one(place, inputs, tmp_path_factory):
    """(output folder, what was seen while training) of the same jobs in this process."""
    output, records = tmp_path_factory.mktemp("one") / "exps", {}
    with few_sampling_steps():
        for job, (script, argv) in training_jobs(place, inputs, output).items():
            with recording() as records[job]:
                SCRIPTS[script].main(argv)
    for script, argv in other_jobs(place, inputs, output).values():
        {"cache_latents": cache_latents, "evaluate": evaluate}[script].main(argv)
    return output, records


@pytest.mark.parametrize("job", SCRIPTS)
def test_draws_and_data_are_those_of_one_process(job, one, two):
    assert_draws_and_data_of_one(one[1][job], [process[job] for process in two[1:]])


@pytest.mark.parametrize("job", SCRIPTS)
def test_gradients_are_equal_on_all_ranks(job, one, two):
    """Of every parameter of every network, bit for bit, before clipping; and so are the weights that follow."""
    assert_equal_on_both(one[1][job], [process[job] for process in two[1:]])

    whole, names = one[1][job], small.checkpoint(one[0], job, 3)["param_names"]
    order = {
        "train_repae": ["opt_vae", "opt_disc", "opt"],
        "train_ldm_only": ["opt"],
        "train_vae": ["opt_vae", "opt_disc"],
    }
    frozen = {"pos_embed"} if job == "train_ldm_only" else set()  # the position table learns in REPA-E training alone
    expected = [set(names[optimizer]) - frozen for optimizer in order[job]] * 3
    assert [set(step) for step in whole["gradients"]] == expected
    assert all(any(norm > 0 for norm, _ in step.values()) for step in whole["gradients"])
    if job == "train_repae":
        assert all(step["pos_embed"][0] > 0 for step in whole["gradients"][2::3])


LOWLR = [(1e-5, 0, 1e-5), (5e-4, 1e-5, 2e-3), (3e-3, 1e-4, 1e-2)]  # relative, absolute, relative of gradient norms


@pytest.mark.parametrize("job", SCRIPTS)
def test_losses_are_those_of_one_process(job, one, two):
    rows = zip(small.metrics(one[0], job), small.metrics(two[0], job), LOWLR, strict=True)
    for expected, actual, (rel, absolute, rel_norms) in rows:
        assert expected.keys() == actual.keys()
        for name in expected.keys() - set(PER_PROCESS_NORM):
            allowed = rel_norms if "norm" in name else rel
            assert actual[name] == pytest.approx(expected[name], rel=allowed, abs=absolute), (expected["step"], name)


def test_both_processes_measure_the_latents(one, two):
    for name in ("latents_scale", "latents_bias"):
        measured = [torch.load(output / "train_repae" / "latents-stats.pt")[name] for output in (one[0], two[0])]
        torch.testing.assert_close(*measured, rtol=1e-6, atol=1e-6)
    files = [torch.load(output / "train_vae" / "train_vae-latents-stats.pt") for output in (one[0], two[0])]
    torch.testing.assert_close(*files, rtol=1e-4, atol=1e-4)


def test_both_processes_draw_the_previews(one, two):
    names = [
        sorted(path.name for path in (output / "train_repae" / "samples").iterdir()) for output in (one[0], two[0])
    ]
    assert names[0] == names[1] == ["0000003-reconstructions.png", "0000003-samples.png"]


def test_the_normaliser_sees_the_joined_batch(two):
    expected = normalise(latents())
    actual = [process["normaliser"] for process in two[1:]]
    joined = torch.cat([process["outputs"] for process in actual])
    torch.testing.assert_close(joined, expected["outputs"], rtol=1e-6, atol=1e-6)
    for process in actual:
        torch.testing.assert_close(process["buffers"], expected["buffers"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("odd batch", "--batch-size: 9 images do not divide by 2 processes"),
        ("no data", "none is not a folder"),
        ("no reference", "error: --eval-reference: "),
        ("other statistics", "was made in the space of inception"),
    ],
)
def test_bad_input_is_refused_once_for_all(job, message, two):
    """Exit code 2 on both, one line on stderr from rank 0 alone, and nothing written."""
    output, first, second = two
    assert first[job]["code"] == second[job]["code"] == 2
    assert message in first[job]["stderr"] and first[job]["stderr"].count("\n") == 1
    assert second[job]["stderr"] == ""
    assert not (output / "refused").exists()


def test_what_one_process_alone_meets_is_said_by_it_and_ends_all(two):
    first, second = (process["damaged image"] for process in two[1:])
    assert first["code"] == second["code"] == 2 and not (two[0] / "damaged.json").exists()
    assert "error" not in first["stderr"].lower()
    (said,) = (line for line in second["stderr"].splitlines() if "error" in line.lower())
    assert "[rank 1]: error: " in said and "5.png" in said


@pytest.mark.parametrize("count", [90, 15])
def test_metrics_are_those_of_one_process(count, two):
    expected = evaluate_images(count)
    assert len(expected) == 11 and expected["fid"] > 0 and expected["sfid"] > 0
    for process in two[1:]:
        assert process["evaluation"][count] == pytest.approx(expected, rel=1e-6)


def test_the_online_evaluation_is_that_of_one_process(one, two):
    """70 samples are two batches of 64: one for each process."""
    curves = [(output / "train_ldm_only" / "evaluations.jsonl").read_text().splitlines() for output in (one[0], two[0])]
    assert len(curves[0]) == len(curves[1]) == 1
    expected, actual = (json.loads(curve[0]) for curve in curves)
    assert actual["step"] == 3 and actual == pytest.approx(expected, rel=1e-3)


def test_the_cache_is_that_of_one_process(one, two):
    """20 images are two whole batches and a short one; the statistics are measured by both."""
    expected, actual = (json.loads((output / "cache.json").read_text()) for output in (one[0], two[0]))
    assert np.array_equal(*(np.load(output / "cache.npy") for output in (one[0], two[0])))
    for name in ("latents_scale", "latents_bias"):
        np.testing.assert_allclose(actual.pop(name), expected.pop(name), rtol=1e-6)
    assert actual == expected


@pytest.mark.parametrize(("job", "rel"), [("evaluate", 1e-6), ("reconstruct", 1e-4)])
def test_evaluate_py_gives_the_numbers_of_one_process_at_another_batch_size(job, rel, one, two):
    """A reconstruction's level may flip at another batch size."""
    expected, actual = (json.loads((output / f"{job}.json").read_text()) for output in (one[0], two[0]))
    assert (expected["processes"], actual["processes"]) == (1, 2)
    for numbers, others in zip(measured(expected), measured(actual), strict=True):
        assert len(numbers) >= 3 and others == pytest.approx(numbers, rel=rel)


def measured(record: dict) -> list[dict[str, float]]:
    """The metrics of each VAE, or of the samples."""
    names = ("fd_", "precision_", "recall_")
    samples = {key: value for key, value in record.items() if key.startswith(names)}
    return list(record["results"].values()) if "results" in record else [samples]
