"""The table names every check, also one that failed, and lies in a file."""

import json
from types import SimpleNamespace

import torch

from tests.gpu.conftest import write_summary


def result(name, outcome, *properties, when="call"):
    about = dict(nodeid=f"tests/gpu/test_x.py::{name}", outcome=outcome, failed=outcome == "failed", when=when)
    return SimpleNamespace(**about, user_properties=properties, duration=1.5)


def test_failures_and_rates_are_in_the_result(tmp_path, capsys):
    results = [
        result("test_one", "passed", ("check", ("loss", 0.1, 0.2)), ("rate", {"images_per_second": 3.0})),
        result("test_two", "failed", ("check", ("loss", 0.3, 0.2))),
        result("test_three", "failed", when="setup"),
        result("test_one", "passed", when="teardown"),
    ]
    checks, rates = (json.loads(f.read_text())["rows"] for f in write_summary(results, torch.device("cpu"), tmp_path))
    assert [(row["test"], row["outcome"], row["found"]) for row in checks] == [
        ("test_one", "passed", 0.1),
        ("test_two", "failed", 0.3),
        ("test_three", "failed", None),
    ]
    assert rates == [{"images_per_second": 3.0}]
    assert "test_two" in capsys.readouterr().out
