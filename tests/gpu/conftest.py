"""The table and the file that `make test-gpu` ends with; and its devices."""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS reads it once, before the first --deterministic run

import pytest
import torch

from benchmarks.common import RESULTS, report
from tests.support.golden_data import Tally


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            item.user_properties.append(("on_gpu", True))  # keywords would not tell: the folder's name is one
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(reason="torch sees no CUDA device (`-m gpu`, word for word, shows it one)")
                )


@pytest.fixture
def bounded(record_property):
    """`bounded(what, found, bound)`: found is written into the table, then asserted to be no more than the bound."""

    def check(what: str, found: float, bound: float) -> None:
        record_property("check", (what, float(found), bound))
        assert found <= bound, f"{what}: {found:.3g}, at most {bound:.3g} is allowed"

    return check


# Of the tolerances that the CPU's own tests hold it to: other kernels add in another order. Of a trajectory's movements
# nine elements in ten must come within 5 % of the learning rate, there as here.
SHARES = {"elements": 1}
SHARE = 10


@pytest.fixture
def of_tolerances(record_property):
    """`of_tolerances(check, *args)`: a golden check; the largest share of a tolerance of each kind is in the table."""

    def run(check: Callable, *args) -> None:
        tally = Tally(limit=math.inf)
        try:
            check(*args, tally=tally)
        finally:
            for kind, share in tally.shares.items():
                record_property("check", (f"{kind}, in tolerances of the CPU", share, SHARES.get(kind, SHARE)))
        over = {kind: share for kind, share in tally.shares.items() if share > SHARES.get(kind, SHARE)}
        assert tally.shares and not over, f"in tolerances of the CPU: {over}"

    return run


@pytest.fixture
def leaves_numerics():
    """What a run sets for its process ends with the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def pytest_terminal_summary(terminalreporter):
    results = [one for kind in ("passed", "failed", "error") for one in terminalreporter.stats.get(kind, ())]
    results = [one for one in results if ("on_gpu", True) in one.user_properties]
    if results:
        write_summary(results, torch.device("cuda"), RESULTS)


def write_summary(results: Iterable[pytest.TestReport], device: torch.device, output: Path) -> list[Path]:
    """Print and write what was found: a row for every bound, for every test that has none, and then the rates."""
    results = [one for one in results if one.when == "call" or one.failed]
    args = argparse.Namespace(device=device, output=output)
    rows = [row for one in results for row in check_rows(one)]
    rates = [value for one in results for key, value in one.user_properties if key == "rate"]
    files = [report(args, "test-gpu", rows)]
    return files + ([report(args, "test-gpu-rates", rates)] if rates else [])


def check_rows(result: pytest.TestReport) -> list[dict]:
    about = {"test": result.nodeid.split("::")[-1], "outcome": result.outcome}
    checks = [value for key, value in result.user_properties if key == "check"] or [("", None, None)]
    return [
        about | {"check": what, "bound": bound, "found": found, "seconds": result.duration}
        for what, found, bound in checks
    ]
