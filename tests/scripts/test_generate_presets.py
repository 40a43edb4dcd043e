"""generate.py --preset: the job of its flags; the published number at the start and on record; blame in errors."""

import numpy as np
import pytest

import generate
from configs.arguments import generate_arguments
from configs.presets import PRESETS
from sampling.job import output_name
from sampling.presets import changed_options, preset_line, published_result
from tests.support import small
from tests.support.sampling import BATCH, COUNT, draw, flags, interrupt, refused

NAME = "e2e-vavae-800ep-cfg"
ROW = {key: value for key, value in PRESETS[NAME].options.items() if key not in ("exp_path", "train_steps")}
SMALL = dict(num_fid_samples=COUNT, num_steps=3)  # what a test cannot afford of it


@pytest.mark.parametrize("first", ["preset", "flags"])
def test_an_interrupted_job_goes_on_by_preset_or_by_flags(exps, tmp_path, monkeypatch, first):
    ways = {"preset": dict(preset=NAME, cfg_scale=None) | SMALL, "flags": ROW | SMALL}
    second = ways.pop("flags" if first == "preset" else "preset")
    interrupt(exps, tmp_path / "a", monkeypatch, after=2, **ways[first])
    resumed, whole = draw(exps, tmp_path / "a", **second), draw(exps, tmp_path / "b", **second)
    assert resumed.record["drawn"] == COUNT - 2 * BATCH and np.array_equal(resumed.images, whole.images)
    assert resumed.npz.name == "repae_0000007_cfg2.4-0.0-0.73_sde_steps3_n20_equal.npz"


def test_the_published_number_is_said_at_the_start_and_on_record(exps, tmp_path, caplog):
    caplog.set_level("INFO")
    record = draw(exps, tmp_path, preset=NAME, cfg_scale=None, **SMALL).record
    assert record["options"]["preset"] == NAME and {key: record["options"][key] for key in ROW} == ROW | SMALL
    changed = {"--exp-path": str(exps / "repae"), "--num-fid-samples": COUNT, "--num-steps": 3}
    of = "REPA-E/sit-ldm-e2e-vavae, step 4000000"
    assert record["preset"] == {"name": NAME, "published_gfid": 1.12, "of": of, "changed": changed}
    (line,) = [line for line in caplog.messages if "gFID" in line]
    assert line.startswith(f"--preset {NAME}: the authors state gFID 1.12 (of {of}; not measured with this code)")
    assert line.endswith(
        f"differs from theirs in --exp-path {exps / 'repae'}, --num-fid-samples {COUNT}, --num-steps 3"
    )


def test_a_job_without_a_preset_promises_nothing(exps, tmp_path, caplog):
    caplog.set_level("INFO")
    assert draw(exps, tmp_path, num_fid_samples=BATCH).record["preset"] is None
    assert not [line for line in caplog.messages if "gFID" in line]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_it_is_differs_in_nothing(name):
    args = generate_arguments(["--preset", name, "--sample-dir", "elsewhere", "--save-png", "--pproc-batch-size", "64"])
    assert changed_options(args) == {} and preset_line(published_result(args)).endswith("not measured with this code)")


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (dict(cfg_scale=1.5), {"--cfg-scale": 1.5}),
        (dict(ema=False), {"--ema": False}),
        (dict(classes="1,2"), {"--classes": "1,2"}),
        (dict(precision="bf16"), {"--precision": "bf16"}),
        (dict(train_steps="50000"), {"--train-steps": "50000"}),
        (dict(exp_path="exps/run"), {"--exp-path": "exps/run"}),
        (dict(global_seed=1), {"--global-seed": 1}),
    ],
)
def test_what_differs_from_the_preset_is_named(given, changed):
    args = generate_arguments(small.argv(preset=NAME, **given))
    assert changed_options(args) == changed
    assert preset_line(published_result(args)).endswith(" ".join(map(str, next(iter(changed.items())))))


def test_the_name_of_the_result_is_that_of_the_flags(exps):
    for name, preset in PRESETS.items():
        run = generate.load_trained(exps / "repae")
        by_name, by_flags = generate_arguments(["--preset", name]), generate_arguments(small.argv(**preset.options))
        assert output_name(by_name, run) == output_name(by_flags, run)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (dict(heun=True), ["--heun goes with", f"(--preset {NAME} sets --mode sde)"]),
        (dict(num_fid_samples=21), ["21 samples", f"(--preset {NAME} sets --label-sampling equal)"]),
    ],
)
def test_a_refused_option_is_the_presets_where_nobody_gave_it(exps, tmp_path, capsys, options, needed):
    line = refused(flags(exps, tmp_path / "new", **dict(preset=NAME, cfg_scale=None) | options), capsys, tmp_path)
    assert all(part in line for part in needed), line


def test_a_checkpoint_that_was_not_fetched_is_named_with_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(["--preset", "repae-invae-80ep"], capsys, tmp_path)
    assert "`hf download REPA-E/sit-repae-invae --local-dir pretrained/sit-repae-invae`" in line
    assert "--preset repae-invae-80ep: pretrained/sit-repae-invae is no folder" in line
