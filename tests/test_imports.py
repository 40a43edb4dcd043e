"""The house in order: imports run one way, `--help` is instant, files stay short."""

import ast
import graphlib
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import small

ROOT = small.ROOT
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# configs, utils <- dataset <- models <- loss, training, sampling <- evaluation <- scripts. Rooms of one storey do not
# import each other, so that no circle can arise between them.
STOREYS = (
    ("configs", "utils"),
    ("dataset",),
    ("models",),
    ("loss", "training", "sampling"),
    ("evaluation",),
    ("scripts",),
)
ROOMS = tuple(room for storey in STOREYS for room in storey if room != "scripts")
MAY_IMPORT = {
    room: {room} | {lower for below in STOREYS[:level] for lower in below}
    for level, storey in enumerate(STOREYS)
    for room in storey
}
OWN = {*MAY_IMPORT, *SCRIPTS, "tests", "examples", "benchmarks"}
FOLDERS = (*ROOMS, "tests", "examples", "benchmarks")
LONGER_THAN_400_LINES: dict[str, str] = {}  # file: why


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    """Top-level names of our own that a file imports."""
    return {name.split(".")[0] for name in imported_modules(path)} & OWN


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    paths = [ROOT / f"{script}.py" for script in SCRIPTS] if room == "scripts" else files(room)
    assert paths
    for path in paths:
        assert imported(path) <= MAY_IMPORT[room], path


def test_no_circle_of_files():
    """Within a room too: read in some order, every file stands on files that came before it."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(*ROOMS)}
    needs = {name: imported_modules(path) & modules.keys() for name, path in modules.items()}
    assert sum(map(len, needs.values())) > 100
    list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError


def test_every_file_says_its_subject_first():
    for path in [*ROOT.glob("*.py"), *files(*ROOMS)]:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert len(first) > 10, path


def test_nobody_imports_a_script():
    """But for benchmarks, which measure a script's own step."""
    for path in files("examples"):
        assert not imported(path) & set(SCRIPTS), path


def test_library_functions_do_not_print():
    """To stdout, that is; the `main` of a module that is a command may."""
    for path in files(*ROOMS):
        body = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") != "main"]
        for call in [call for node in body for call in ast.walk(node) if isinstance(call, ast.Call)]:
            to_stderr = any(keyword.arg == "file" for keyword in call.keywords)
            assert getattr(call.func, "id", None) != "print" or to_stderr, f"{path}:{call.lineno}"


def test_files_stay_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in [*ROOT.glob("*.py"), *files(*FOLDERS)]
    }
    assert {name for name, length in lengths.items() if length > 400} == set(LONGER_THAN_400_LINES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_heavy_import(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"{script}.py", "--help"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"torch", "timm", "diffusers", "numpy", "accelerate", "PIL"}


def test_importing_does_no_work():
    """A module's own level defines and imports; what it would execute beyond that stands behind `__name__`."""
    for path in [*ROOT.glob("*.py"), *files(*ROOMS, "examples", "benchmarks")]:
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
            defines = isinstance(
                node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
            )
            assert docstring or guarded or defines, f"{path}:{node.lineno}"


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    assert len(lines) >= 12 and all("==" in line for line in lines)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"] == 120


def test_names_that_others_rely_on():
    """Signatures that DESIGN promises: parameter names in order, `*` before the keyword-only ones."""
    from loss.alignment import alignment_loss
    from models import encoders, sit, vae
    from sampling import samplers

    def parameters(function) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert {f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (1, 2, 4, 8)} <= set(sit.SiT_models)
    config = json.loads((ROOT / "tests" / "golden" / "sit_a.json").read_text())["config"]
    assert set(config) <= set(parameters(sit.SiT.__init__))
    assert parameters(sit.SiT.forward) == ["x_t", "t", "labels", "drop"]
    assert parameters(sit.SiT.normalize) == ["z"] and parameters(sit.SiT.project) == ["x_t", "t", "labels"]
    assert {"f8d4", "f16d32"} <= set(vae.vae_models) and parameters(vae.load_vae)[:2] == ["arch", "path"]
    assert parameters(encoders.load_encoder) == ["name", "resolution", "checkpoint"]
    assert parameters(alignment_loss) == ["projections", "targets"]
    common = ["velocity", "noise", "labels", "num_steps", "guidance_scale", "guidance_interval", "null_label"]
    assert parameters(samplers.euler) == parameters(samplers.heun)
    assert parameters(samplers.euler)[: len(common)] == common
    of_sde = {"path_type", "step_noise"}
    assert set(parameters(samplers.euler_maruyama)) == {*parameters(samplers.euler), *of_sde}
