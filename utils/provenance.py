"""What made a file: the commit, the versions of the packages, and the command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate", "numpy")


def commit() -> str:
    """Of this code, with "+" behind it where files of it are changed; "unknown" where git does not know."""
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def made_by(**more: object) -> dict:
    """Commit, versions and command of this process, and what else is said."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"commit": commit(), "versions": versions(), "command": command, **more}


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
