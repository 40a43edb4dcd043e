"""Every flag and command of the public release, and what a wrong flag gets."""

import argparse
import re
import shlex

import pytest

from configs import arguments, options, parsing
from models.encoders import parse_encoder_list
from tests.support import small
from tests.support.golden_data import GOLDEN

REFERENCE = (GOLDEN / "reference_cli.md").read_text()  # the flags and commands of the public release


README = (small.ROOT / "README.md").read_text()


# Where nothing is given: the device decides; no limit; --data-dir, which is the public default where that is its own;
# the data folder's own number.
OUR_DEFAULTS = {
    *("--compile", "--epochs", ("cache_latents.py", "--output-dir")),
    *(("train_repae.py", "--num-classes"), ("train_ldm_only.py", "--num-classes")),
}


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
def test_every_public_flag_is_there_with_its_default(script, flag, kind, default, choices):
    action = actions(script)[flag]
    if default == "required":
        assert action.required
    elif (script, flag) in OUR_DEFAULTS or flag in OUR_DEFAULTS:
        assert action.default is None
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


def test_every_public_encoder_name_is_known():
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


# Values of flags that are free text and no path; names of encoders may hold one.
NAMES = {"exp_name", "resume", "vae_latents_name", "vae_name", "train_steps", "guide_train_steps", "classes"}
ENCODERS = {"enc_type", "features", "eval_features"}


def free_text() -> list[tuple[str, str]]:
    """(script, flag) of every flag that takes any text."""
    kinds = (None, parsing.path, parsing.paths, parsing.encoders)
    return [
        (script, flag)
        for script in options.PARSERS
        for flag, action in actions(script).items()
        if action.type in kinds and not action.choices and action.nargs != 0
    ]


def parsed(script: str, *words: str):
    required = [(flag, "x") for flag, action in actions(script).items() if action.required and flag not in words]
    return vars(options.PARSERS[script]().parse_args([*(word for pair in required for word in pair), *words]))


@pytest.mark.parametrize(("script", "flag"), free_text())
def test_every_path_may_start_at_home(script, flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    action = actions(script)[flag]
    given, value = "~/runs/x.pt", "/home/someone/runs/x.pt"
    if action.dest in ENCODERS:
        given, value = f"clip-vit-L,timm:local-dir:{given}", f"clip-vit-L,timm:local-dir:{value}"
    if action.dest in NAMES:
        value = given
    assert parsed(script, flag, given)[action.dest] == ([value] if action.nargs == "+" else value)


def test_of_several_files_each_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parsing.paths("~/a.pth,,b~.pth, ~/c") == "/home/me/a.pth,,b~.pth,/home/me/c"
    assert parsing.encoders("timm:local-dir:~/a,timm:local-dir:b,~c") == "timm:local-dir:/home/me/a,timm:local-dir:b,~c"
    assert parsed("evaluate.py", "--vae-ckpt", "~/a", "ORG/NAME")["vae_ckpt"] == ["/home/me/a", "ORG/NAME"]
    assert parsing.path("./a~b/") == "./a~b/" and parsing.path("~nobody-here/a") == "~nobody-here/a"


@pytest.mark.parametrize("script", ["train_repae.py", "train_vae.py"])
def test_the_loss_of_this_repository_is_found_from_any_folder(script, tmp_path, monkeypatch):
    monkeypatch.chdir(small.ROOT)
    shipped = "configs/l1_lpips_kl_gan.yaml"
    assert parsed(script)["loss_cfg_path"] == shipped and type(parsed(script)["loss_cfg_path"]) is str
    monkeypatch.chdir(tmp_path)
    found = tmp_path / parsed(script)["loss_cfg_path"]
    assert found.samefile(small.ROOT / shipped)
    assert parsed(script, "--loss-cfg-path", shipped)["loss_cfg_path"] == shipped  # what is given counts from here


def test_what_train_vae_does_not_read_it_does_not_accept(capsys):
    for flag in ("--num-classes", "--prediction", "--wandb-history-path", "--cfg-prob"):
        with pytest.raises(SystemExit):
            parsed("train_vae.py", flag, "1")
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_two_spellings_of_a_flag_at_once_are_refused(capsys):
    assert parsed("train_vae.py", "--learning-rate", "3e-5")["vae_learning_rate"] == 3e-5
    assert parsed("train_vae.py", "--vae-learning-rate", "3e-5", "--vae-learning-rate", "1")["vae_learning_rate"] == 1
    with pytest.raises(SystemExit):
        parsed("train_vae.py", "--learning-rate", "3e-5", "--vae-learning-rate", "1")
    assert "--learning-rate and --vae-learning-rate are one flag, and both were given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("train_repae.py", "--model", "SiT-B/2", "--models", "SiT-L/2")


def test_a_number_out_of_range_is_refused(capsys):
    for flag, value in (("--batch-size", "0"), ("--learning-rate", "nan"), ("--cfg-prob", "-1"), ("--seed", "1.5")):
        with pytest.raises(SystemExit):
            arguments.repae_parser().parse_args(["--exp-name", "x", flag, value])
        assert f"{flag}: '{value}' was given" in capsys.readouterr().err


def test_a_list_of_numbers_may_begin_with_a_minus():
    parse = arguments.evaluate_parser().parse_args
    assert parse(["--samples-range", "-1,1", "--samples", "1.npz"]).samples_range == "-1,1"
    assert parse(["--samples-range=-1,1"]).samples_range == "-1,1"
    with pytest.raises(SystemExit):
        parse(["--samples", "a.npz", "-1,1"])
