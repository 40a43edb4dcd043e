"""What accelerate's launcher asks for: refused, or a line where it is the user's wish and not what the script does."""

import accelerate
import pytest

from utils.distributed import launcher_notes, start_processes
from utils.errors import InputError


class Built(Exception):
    """The accelerator would have been."""


@pytest.fixture
def built(monkeypatch):
    """The arguments of the accelerator that `start_processes` asks for; none is built."""
    arguments = {}

    def build(**given):
        arguments.update(given)
        raise Built

    monkeypatch.setattr(accelerate, "Accelerator", build)
    return arguments


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("FSDP", "true", "FSDP"),
        ("FSDP", "1", "FSDP"),  # accelerate reads it as on in one place, as off in others
        ("DEEPSPEED", "true", "DeepSpeed"),
        ("MEGATRON_LM", "True", "Megatron-LM"),
        ("PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("SAGEMAKER", "true", "SageMaker"),
    ],
)
def test_what_is_not_plain_data_parallel_is_refused_before_anything_starts(flag, value, name, built, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", value)
    with pytest.raises(InputError, match=f"configured for .*{name};.* plain data parallel"):
        start_processes()


@pytest.mark.parametrize("value", ["", "false", "False", "0"])
def test_a_plugin_that_is_off_is_no_obstacle(value, built, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    with pytest.raises(Built):
        start_processes()


def test_precision_and_compiling_are_not_left_to_the_environment(built):
    with pytest.raises(Built):
        start_processes()
    assert built["mixed_precision"] == built["dynamo_backend"] == "no"


@pytest.mark.parametrize(
    ("asked", "does", "said"),
    [
        (None, "fp16", False),
        ("no", "fp16", False),  # what the launcher hands on where nobody chose anything
        ("fp16", "fp16", False),
        ("bf16", "fp16", True),
        ("fp8", "no", True),
    ],
)
def test_a_line_where_the_launcher_asks_for_something_else(asked, does, said, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    line = f"accelerate is configured for mixed_precision {asked}, which does not count here: --precision does"
    assert launcher_notes(mixed_precision=(does, "--precision")) == ([line] if said else [])


def test_each_setting_has_its_own_line(monkeypatch):
    for setting, value in (("GRADIENT_ACCUMULATION_STEPS", "2"), ("DYNAMO_BACKEND", "INDUCTOR")):
        monkeypatch.setenv(f"ACCELERATE_{setting}", value)
    notes = launcher_notes(gradient_accumulation_steps=("1", "a"), dynamo_backend=("no", "b"))
    assert len(notes) == 2 and "dynamo_backend inductor" in notes[1]
    assert launcher_notes(gradient_accumulation_steps=("2", "a"), dynamo_backend=("inductor", "b")) == []
