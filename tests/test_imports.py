"""The house in order: imports run one way, `--help` is instant, files stay short."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import small

ROOT = small.ROOT
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# configs, utils <- models <- loss <- scripts
MAY_IMPORT = {
    "configs": {"configs"},
    "utils": {"configs", "utils"},
    "models": {"configs", "utils", "models"},
    "loss": {"configs", "utils", "models", "loss"},
    "scripts": {"configs", "utils", "models", "loss"},
}
OWN = {*MAY_IMPORT, *SCRIPTS, "tests", "examples", "benchmarks"}
FOLDERS = ("configs", "utils", "models", "loss", "tests", "examples", "benchmarks")
LONGER_THAN_400_LINES: dict[str, str] = {}  # file: why


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of our own that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name.split(".")[0] for name in names} & OWN


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_run_one_way(layer):
    paths = [ROOT / f"{script}.py" for script in SCRIPTS] if layer == "scripts" else files(layer)
    assert paths
    for path in paths:
        assert imported(path) <= MAY_IMPORT[layer], path


def test_nobody_imports_a_script():
    for path in files("examples", "benchmarks"):
        assert not imported(path) & set(SCRIPTS), path


def test_library_functions_do_not_print():
    """To stdout, that is; the `main` of a module that is a command may."""
    for path in files("configs", "utils", "models", "loss"):
        body = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") != "main"]
        for call in [call for node in body for call in ast.walk(node) if isinstance(call, ast.Call)]:
            to_stderr = any(keyword.arg == "file" for keyword in call.keywords)
            assert getattr(call.func, "id", None) != "print" or to_stderr, f"{path}:{call.lineno}"


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines())
               for path in [*ROOT.glob("*.py"), *files(*FOLDERS)]}  # fmt: skip
    assert {name for name, length in lengths.items() if length > 400} == set(LONGER_THAN_400_LINES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_heavy_import(script):
    done = subprocess.run([sys.executable, "-X", "importtime", f"{script}.py", "--help"], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"torch", "timm", "diffusers", "numpy", "accelerate", "PIL"}


def test_packages_import_without_side_effects():
    """No work on import: nothing is written, torch's generator does not move, no thread or process group starts."""
    code = (
        "import torch, threading; before = torch.get_rng_state(), torch.get_num_threads(), threading.active_count()\n"
        f"import {', '.join(SCRIPTS)}\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_num_threads()\n"
        "assert threading.active_count() == before[2] and not torch.distributed.is_initialized()\n"
    )
    done = small.run_python("-c", code)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    assert len(lines) >= 12 and all("==" in line for line in lines)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"] == 120
