"""What accelerate's launcher asks for: a line where it is the user's wish and not what the script does."""

import pytest

from utils.distributed import launcher_notes


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
