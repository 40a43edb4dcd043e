"""The weights of the VAE's losses, read from YAML (configs/l1_lpips_kl_gan.yaml shows every key)."""

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
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag}: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{flag}: {path} is not YAML ({error})") from None
    if not isinstance(document, Mapping):
        raise InputError(f"{flag}: {path} has no 'key: value' lines")

    # Ours are converted; the public file's further keys must say what we do anyway.
    known = {field.name: field.type for field in fields(VAELossConfig)}
    values = {}
    for key, value in _flat(document).items():
        if key in known:
            values[key] = _converted(key, value, known[key], f"{flag}: {path}")
        elif key in _PUBLIC_ONLY:
            if value not in _PUBLIC_ONLY[key]:
                raise InputError(f"{flag}: {path}: {key} is {value!r}; {_PUBLIC_ONLY[key][0]!r} is supported")
        elif key not in _PUBLIC_UNUSED:
            raise InputError(f"{flag}: {path}: unknown key {key!r}; the keys are {', '.join(known)}")
    return VAELossConfig(**values)


def _flat(document: Mapping) -> dict[str, Any]:
    flat = {}
    for key, value in document.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {str(key): value})
    return flat


def _converted(key: str, value: Any, kind: type, where: str) -> Any:
    if kind is str:
        if value not in ("l1", "l2"):
            raise InputError(f"{where}: {key} is {value!r}; 'l1' or 'l2' is needed")
        return value
    try:
        number = float(value) if not isinstance(value, bool) else None  # YAML 1.1 reads 1e-6 as a string
    except (TypeError, ValueError):
        number = None
    if number is None or not abs(number) < float("inf"):
        raise InputError(f"{where}: {key} is {value!r}; a number is needed")
    if number < 0 and key != "logvar_init":
        raise InputError(f"{where}: {key} is {value!r}; a number >= 0 is needed")
    if key == "lecam_ema_decay" and number > 1:
        raise InputError(f"{where}: {key} is {value!r}; a number in [0, 1] is needed")
    if kind is int and number != int(number):
        raise InputError(f"{where}: {key} is {value!r}; a whole number is needed")
    return kind(number)
