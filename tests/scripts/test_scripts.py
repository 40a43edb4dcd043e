"""The scripts as a user meets them: every public flag and command, and each script once as a process of its own."""

import argparse
import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from configs import arguments, options
from models.encoders import parse_encoder_list
from tests.support import small
from tests.support.forks import Fork
from tests.support.golden_data import GOLDEN

REFERENCE = (GOLDEN / "reference_cli.md").read_text()  # the flags and commands of the public release
README = (small.ROOT / "README.md").read_text()


def reference_flags() -> list[tuple[str, str, str, str, str]]:
    """(script, flag, type, default, choices) of every row of the tables."""
    rows = []
    for section in REFERENCE.split("\n## ")[1:]:
        script = section.splitlines()[0]
        cells = re.findall(r"^\| `(--\S+)` \| (.+?) \| (.+?) \| (.*?) \|$", section, re.M)
        rows += [(script, *row) for row in cells]
    return rows


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command in the code blocks of a Markdown text."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [word for word in words if word in options.PARSERS]
            if scripts:
                found.append((scripts[0], words[words.index(scripts[0]) + 1 :]))
    return found


def actions(script: str) -> dict[str, argparse.Action]:
    return {flag: action for action in options.PARSERS[script]()._actions for flag in action.option_strings}


def test_the_tables_are_read_whole():
    assert len(reference_flags()) == REFERENCE.count("\n| `--") == 113
    assert {script for script, *_ in reference_flags()} == options.PARSERS.keys() - {"train_vae.py", "evaluate.py"}
    assert len(commands(REFERENCE)) == 6


@pytest.mark.parametrize(("script", "flag", "kind", "default", "choices"), reference_flags())
def test_every_public_flag(script, flag, kind, default, choices):
    action = actions(script)[flag]
    if default == "required":
        assert action.required
    elif flag == "--compile":
        assert action.default is None  # on where there is CUDA
    else:
        expected = {"True": True, "False": False, "None": None}.get(default, default.strip("'"))
        assert action.default == (expected if kind in ("str", "on/off") else _number(expected))
    if kind == "on/off":
        assert isinstance(action, argparse.BooleanOptionalAction)
    elif not action.choices:
        text, value = {"str": ("x", "x"), "int": ("7", 7), "float": ("1.0", 1.0)}[kind]
        assert (action.type or str)(text) == value
    if choices.startswith("[") and flag != "--resolution":  # 256 alone in the public release, here any
        assert set(re.findall(r"'(\w+)'", choices)) <= set(action.choices)
    if choices == "every SiT name":
        names = {f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (1, 2, 4, 8)}
        assert names <= set(action.choices) and "--models" in action.option_strings


def _number(text):
    return text if text is None else float(text)


def test_every_public_encoder_name():
    names = re.search(r"`--enc-type`: (.*?);", REFERENCE)[1].split(", ")
    assert len(names) == 9 and [name for name, _ in parse_encoder_list(",".join(names))] == names


@pytest.mark.parametrize(("script", "words"), commands(REFERENCE))
def test_every_public_command_parses(script, words):
    args = options.PARSERS[script]().parse_args(words)
    for flag, value in (word.split("=", 1) for word in words if word.startswith("--") and "=" in word):
        assert str(getattr(args, flag[2:].replace("-", "_"))) in (value, str(_try_number(value)))


def _try_number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def test_the_public_commands_are_in_the_readme():
    assert {str(command) for command in commands(REFERENCE)} <= {str(command) for command in commands(README)}


def test_every_flag_has_a_meaning():
    for script in options.PARSERS:
        for flag, action in actions(script).items():
            assert action.help and len(action.help) > 5, (script, flag)


@pytest.mark.parametrize("parser", options.PARSERS.values(), ids=options.PARSERS)
def test_a_mistyped_flag_is_one_line(parser, capsys):
    with pytest.raises(SystemExit) as leaving:
        parser().parse_args(["--modle", "x"])
    assert leaving.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_number_out_of_range_is_refused(capsys):
    for flag, value in (("--batch-size", "0"), ("--learning-rate", "nan"), ("--cfg-prob", "-1"), ("--seed", "1.5")):
        with pytest.raises(SystemExit):
            arguments.repae_parser().parse_args(["--exp-name", "x", flag, value])
        assert f"{flag}: '{value}' was given" in capsys.readouterr().err


# Each script once as a process of its own, fresh where it shows more than a fork; for cache_latents.py and generate.py,
# and for several processes, see test_cache_latents.py, test_generate.py and test_distributed.py.


@pytest.fixture(scope="module")
def processes(place, tmp_path_factory):
    """Folder, and the finished process of every script, two at a time."""
    folder = tmp_path_factory.mktemp("scripts")
    exps, short = folder / "exps", dict(max_train_steps=2)
    for i in range(6):
        path = folder / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 40, 3), 40 * i, np.uint8)).save(path)
    fresh, forked = small.run_python, lambda *words: Fork(*words).wait()
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")
    trees = dict(imagenet_path=folder / "images", output_path=folder / "data", resolution=24, num_workers=2)
    repae = small.repae_options(place, exps, "repae", num_workers=1, num_preview=2, deterministic=True, **short)
    refused = small.repae_options(place, exps, "refused", data_dir=folder / "none")
    first = {
        "preprocessing": (fresh, "preprocessing.py", *small.argv(**trees)),
        "train_repae": (forked, "train_repae.py", *repae),
        "train_ldm_only": (fresh, *launch, "train_ldm_only.py", *small.ldm_options(place, exps, "ldm", **short)),
        "train_vae": (forked, "train_vae.py", *small.vae_options(place, exps, "vae", **short)),
        "refused": (fresh, "train_repae.py", *refused),
    }
    checkpoint = exps / "repae" / "checkpoints" / "0000002.pt"
    vae = dict(repae_ckpt=checkpoint, vae_name="e2e", save_dir=exps)
    images = dict(reconstruct=True, vae_ckpt=place.vae, data_dir=place.data, features="none", lpips=False)
    then = {
        "save_vae_weights": (forked, "save_vae_weights.py", *small.argv(**vae)),
        "evaluate": (forked, "evaluate.py", *small.argv(**images, output=folder / "reconstruction.json")),
    }
    done = {}
    with ThreadPoolExecutor(2) as pool:
        for stage in (first, then):
            started = pool.map(lambda words: words[0](*words[1:]), stage.values())
            done |= dict(zip(stage, started, strict=True))
    return folder, done


def test_every_script_runs(processes):
    folder, done = processes
    for name, process in done.items():
        assert process.returncode == (2 if name == "refused" else 0), (name, process.stderr)
        assert "Traceback" not in process.stderr, (name, process.stderr)
    expected = [
        "data/images.npy",
        "exps/repae/samples/0000002-samples.png",
        "exps/vae/vae.pt",
        "exps/ldm/checkpoints/0000002.pt",
        "exps/e2e/e2e.pt",
        "exps/e2e/diffusers/config.json",
        "reconstruction.json",
    ]
    assert [name for name in expected if not (folder / name).is_file()] == []


def test_what_they_wrote(processes):
    folder, _ = processes
    assert np.load(folder / "data" / "images.npy").shape == (6, 3, 24, 24)
    assert np.load(folder / "data" / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1]
    for name in ("repae", "vae", "ldm"):
        rows = small.metrics(folder / "exps", name)
        assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(list(row.values())).all() for row in rows)
        assert json.loads((folder / "exps" / name / "args.json").read_text())["exp_name"] == name
    checkpoint = small.checkpoint(folder / "exps", "repae", 2)
    exported = torch.load(folder / "exps" / "e2e" / "e2e.pt")
    assert all(torch.equal(checkpoint["vae"][key], tensor) for key, tensor in exported.items())


def test_a_refusal_is_one_line_of_a_real_process_too(processes):
    """Imports and libraries add nothing to stderr."""
    folder, done = processes
    lines = done["refused"].stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_repae.py: error: --data-dir"), lines
    assert done["refused"].stdout == "" and not (folder / "exps" / "refused").exists()
