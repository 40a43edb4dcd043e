"""Presets are README's published results: the same options as the command of a row, the same number as its cell."""

import re

import pytest

from configs.arguments import generate_arguments
from configs.presets import PRESETS
from tests.configs.test_arguments import README, commands

SECTION = README.split("\n## Published results\n")[1].split("\n## ")[0]
BESIDE = re.findall(r"^# (\S+): gFID ([\d.]+)\n", SECTION, re.M)  # above each full command
COMMANDS = [words for script, words in commands(SECTION) if script == "generate.py" and "--preset" not in words]


def test_every_preset_has_its_command_and_its_number():
    assert [name for name, _ in BESIDE] == list(PRESETS) and len(COMMANDS) == len(PRESETS) == 10
    cells = re.findall(r"\| ([\d.]+) `(\S+)` (?=\|)", SECTION)
    assert {name: float(gfid) for gfid, name in cells} == {name: float(gfid) for name, gfid in BESIDE}
    assert {name: float(gfid) for name, gfid in BESIDE} == {name: preset.gfid for name, preset in PRESETS.items()}


@pytest.mark.parametrize(("name", "words"), list(zip(PRESETS, COMMANDS, strict=True)))
def test_a_preset_is_the_command_of_its_row(name, words):
    by_name, by_flags = vars(generate_arguments(["--preset", name])), vars(generate_arguments(words))
    assert by_name.pop("preset") == name and by_flags.pop("preset") is None
    assert by_name == by_flags
    assert {key: type(value) for key, value in by_name.items()} == {key: type(by_flags[key]) for key in by_name}
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert given == PRESETS[name].options.keys()  # the command is a full one


def test_the_cited_numbers_are_those_of_the_public_release():
    """gFID, scale and end of the guidance interval, labels, as its README states them."""
    stated = {
        "repae-sdvae-80ep": (4.07, 1.0, 1.0, "random"),
        "repae-sdvae-80ep-cfg": (1.67, 2.2, 0.65, "random"),
        "repae-invae-80ep": (4.09, 1.0, 1.0, "random"),
        "repae-invae-80ep-cfg": (1.61, 1.8, 0.825, "random"),
        "repae-vavae-80ep": (4.05, 1.0, 1.0, "random"),
        "repae-vavae-80ep-cfg": (1.73, 1.9, 0.825, "random"),
        "e2e-vavae-800ep": (1.69, 1.0, 1.0, "equal"),
        "e2e-vavae-800ep-cfg": (1.12, 2.4, 0.73, "equal"),
        "e2e-vavae-800ep-random": (1.83, 1.0, 1.0, "random"),
        "e2e-vavae-800ep-random-cfg": (1.26, 2.5, 0.75, "random"),
    }
    columns = ("cfg_scale", "guidance_high", "label_sampling")
    assert stated == {name: (gfid, *(options[key] for key in columns)) for name, (gfid, options) in PRESETS.items()}
    assert {preset.hub for preset in PRESETS.values()} == set(re.findall(r"\[(REPA-E/\S+?)\]\(https", SECTION))


def test_flags_given_beside_a_preset_win():
    preset = ["--preset", "e2e-vavae-800ep-cfg"]
    for words in (["--cfg-scale", "1.5", *preset], [*preset, "--cfg-scale=1.5"]):  # the plain default, too
        args = generate_arguments(words)
        assert args.cfg_scale == 1.5 and args.guidance_high == 0.73 and args.mode == "sde"
    assert generate_arguments([*preset, "--train-steps", "50000"]).train_steps == "50000"


def test_another_run_has_its_own_latest_checkpoint():
    preset = ["--preset", "e2e-vavae-800ep-cfg"]
    args = generate_arguments([*preset, "--exp-path", "exps/my-run"])
    assert args.exp_path == "exps/my-run" and args.train_steps is None and args.cfg_scale == 2.4
    assert generate_arguments(preset).train_steps == "4000000"


def test_an_unknown_preset_and_no_run_are_refused_in_a_line(capsys):
    for words, needed in ((["--preset", "best"], "e2e-vavae-800ep-cfg"), ([], "--exp-path: nothing was given")):
        with pytest.raises(SystemExit) as leaving:
            generate_arguments(words)
        error = capsys.readouterr().err
        assert leaving.value.code == 2 and error.count("\n") == 1 and needed in error
