"""What the words of --vae-ckpt can name; told by a look at the file system, before torch is imported."""

import re
from pathlib import Path

from utils.errors import InputError

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:[:/]([\w.-]+))?")


def is_hub_name(name: str) -> bool:
    """ORG/NAME, ORG/NAME/FOLDER or ORG/NAME:FOLDER, where no local folder of that beginning exists; no file's name."""
    a_file = name.endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors"))
    return _HUB_NAME.fullmatch(name) is not None and not a_file and not Path(name.split("/")[0]).exists()


def hub_parts(name: str) -> tuple[str, str | None]:
    """The repository of an `is_hub_name`, and the folder in it."""
    return _HUB_NAME.fullmatch(name).groups()


def require_vae(path: str | Path, arch: str, flags: tuple[str, str] = ("--vae", "--vae-ckpt")) -> None:
    """Refuse words that name no VAE at all: neither a file nor a folder, nor with "auto" one on the hub.

    Raises:
        InputError: the message says where public ones are; the flag is the caller's to say.
    """
    path = Path(path)
    if path.is_dir() or path.is_file() or (arch == "auto" and is_hub_name(str(path))):
        return
    if str(path).lower() == "none":
        only = "train_repae.py alone starts from fresh weights so, and train_vae.py without this flag"
        raise InputError(f"{path} was given; the weights of a VAE are needed ({only})")
    public = "`hf download REPA-E/sdvae` (f8d4), REPA-E/e2e-vavae (f16d32)"
    auto = f"{flags[0]} auto {flags[1]} stabilityai/sd-vae-ft-mse"
    raise InputError(f"{path} does not exist; public ones: {public}, or {auto}; see 'VAE' in README.md")
