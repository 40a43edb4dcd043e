"""The weights of the VAE's losses, read from YAML (configs/l1_lpips_kl_gan.yaml shows every key)."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from utils.errors import InputError

# Keys of the public file, which nests ours under `losses:`, that have one possible value for a VAE with LPIPS.
_PUBLIC_ONLY = {"perceptual_loss": ("lpips",), "quantize_mode": ("vae",)}
_PUBLIC_UNUSED = ("quantizer_weight",)  # of its vector-quantised models


@dataclass(frozen=True)
class VAELossConfig:
    """Weights and schedule of the VAE's losses; the defaults are those of the public `l1_lpips_kl_gan`.

    total = reconstruction_weight / exp(logvar_init) * |x - x'| + perceptual_weight * LPIPS + kl_weight * KL
            + discriminator_weight * discriminator_factor * -mean D(x'), the last from step discriminator_start on.
    """

    reconstruction_loss: str = "l1"  # or "l2"; mean over all elements
    reconstruction_weight: float = 1.0
    logvar_init: float = 0.0  # log-variance of the reconstruction's likelihood, fixed
    perceptual_weight: float = 1.0  # 0: LPIPS is never constructed
    kl_weight: float = 1e-6  # of the sum over a sample's latent values, averaged over the batch
    discriminator_start: int = 0  # first step with a generator term and a discriminator that learns
    discriminator_factor: float = 1.0  # scales the generator term and the discriminator's own loss
    discriminator_weight: float = 0.1  # scales the generator term alone
    lecam_regularization_weight: float = 0.0  # LeCam, arXiv 2104.03310; 0: off
    lecam_ema_decay: float = 0.999  # of LeCam's running mean logits


def read_loss_config(path: str | Path, *, flag: str = "--loss-cfg-path") -> VAELossConfig:
    """The configuration in a YAML file: flat, or in the public layout with the keys under `losses:`.

    Raises:
        InputError: no such file, no YAML mapping, an unknown key, a value of the wrong kind or range.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag}: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        document = yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what Python says of a date or number that is none
        raise InputError(f"{flag}: {path} is not YAML ({error})") from None
    if not isinstance(document, Mapping):
        raise InputError(f"{flag}: {path} has no 'key: value' lines")

    # Ours are converted; the public file's further keys must say what we do anyway.
    known = {field.name: field.type for field in fields(VAELossConfig)}
    values = {}
    for key, value in _flat(document, f"{flag}: {path}").items():
        if key in known:
            values[key] = _converted(key, value, known[key], f"{flag}: {path}")
        elif key in _PUBLIC_ONLY:
            if value not in _PUBLIC_ONLY[key]:
                raise InputError(f"{flag}: {path}: {key} is {_shown(value)}; {_PUBLIC_ONLY[key][0]!r} is supported")
        elif key not in _PUBLIC_UNUSED:
            raise InputError(f"{flag}: {path}: unknown key {key!r}; the keys are {', '.join(known)}")
    return VAELossConfig(**values)


def _flat(document: Mapping, where: str, depth: int = 3) -> dict[str, Any]:
    if not depth:  # one that names itself would have no end
        raise InputError(f"{where}: keys are nested more than 3 times; flat ones, or all under `losses:`, are needed")
    flat = {}
    for key, value in document.items():
        name = key if isinstance(key, str) else _shown(key)
        flat.update(_flat(value, where, depth - 1) if isinstance(value, Mapping) else {name: value})
    return flat


def _shown(value: Any) -> str:
    """The beginning of a value, however large it is or often it names itself."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:  # Python prints no more than 4300 digits
        return "a number of thousands of digits"


def _converted(key: str, value: Any, kind: type, where: str) -> Any:
    if kind is str:
        if value not in ("l1", "l2"):
            raise InputError(f"{where}: {key} is {_shown(value)}; 'l1' or 'l2' is needed")
        return value
    try:
        number = float(value) if not isinstance(value, bool) else None  # YAML 1.1 reads 1e-6 as a string
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not abs(number) < float("inf"):
        raise InputError(f"{where}: {key} is {_shown(value)}; a number is needed")
    if number < 0 and key != "logvar_init":
        raise InputError(f"{where}: {key} is {_shown(value)}; a number >= 0 is needed")
    if key == "lecam_ema_decay" and number > 1:
        raise InputError(f"{where}: {key} is {_shown(value)}; a number in [0, 1] is needed")
    if kind is int and number != int(number):
        raise InputError(f"{where}: {key} is {_shown(value)}; a whole number is needed")
    return kind(number)
