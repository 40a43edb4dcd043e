"""A trained run, ours or public, as what sampling needs: SiT, the decoder, the latent statistics."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.sit import SIT_SIZES, SiT, config_of_state_dict
from models.vae import downsampling, latent_channels, latent_statistics, load_vae, vae_models
from models.vae_files import vae_of_checkpoint
from utils.checkpoint import checkpoint_path, latest_step, read_checkpoint
from utils.errors import InputError
from utils.modules import load_strictly


@dataclass
class TrainedRun:
    """What sampling needs of a run's checkpoint; networks in evaluation mode, on the CPU until `to`.

    Attributes:
        name, step: of the run, and of its checkpoint; `checkpoint` is the file.
        args: what it was trained with.
        sit: the EMA, or the raw weights.
        vae: `vae_path` is its file, or None where the checkpoint holds it.
        latent_stats: scale and bias (1, C, 1, 1), which undo the normaliser that SiT was trained under.
    """

    name: str
    step: int
    checkpoint: Path
    args: dict
    sit: SiT
    vae: AutoencoderKL
    vae_path: Path | None
    latent_stats: tuple[Tensor, Tensor]

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.sit.grid * self.sit.patch_size * downsampling(self.vae)

    def to(self, device: torch.device) -> None:
        self.sit.to(device)
        self.vae.to(device)
        self.latent_stats = tuple(values.to(device) for values in self.latent_stats)


def load_trained(
    exp_path: str | Path, train_steps: str | None = None, vae_ckpt: str | Path | None = None, *, ema: bool = True
) -> TrainedRun:
    """SiT, VAE and latent statistics of a run's checkpoint, ours or public. No encoder is loaded.

    Args:
        exp_path: the run's folder (`--exp-path`).
        train_steps: which checkpoint (`--train-steps`); the latest when None.
        vae_ckpt: a VAE instead of the checkpoint's own or the one its args name (`--vae-ckpt`).
        ema: SiT's moving average, else its raw weights.

    Raises:
        InputError: no such run or checkpoint, or one whose parts do not fit each other.
    """
    path = find_checkpoint(exp_path, train_steps)
    checkpoint = read_checkpoint(path)
    args = _stored_args(Path(exp_path)) | checkpoint["args"]
    sit = _load_sit(checkpoint["ema" if ema else "model"], args, path)

    vae_path = _find_vae(checkpoint, args, path, vae_ckpt)
    if vae_path is None:
        vae = vae_of_checkpoint(checkpoint, path)
    else:
        trained_with = args.get("vae") if args.get("vae") in vae_models else "auto"
        vae = load_vae("auto" if vae_ckpt else trained_with, vae_path)
    if latent_channels(vae) != sit.in_channels:
        needed = f"the SiT of {path} needs {sit.in_channels}"
        raise InputError(f"--vae-ckpt: the VAE has {latent_channels(vae)} latent channels; {needed}")
    return TrainedRun(
        name=Path(exp_path).resolve().name,
        step=int(path.stem),
        checkpoint=path,
        args=args,
        sit=sit,
        vae=vae.requires_grad_(False),
        vae_path=vae_path,
        latent_stats=_latent_stats(checkpoint, vae, vae_path),
    )


def find_checkpoint(exp_path: str | Path, train_steps: str | None) -> Path:
    run_dir = Path(exp_path)
    if not run_dir.is_dir():
        raise InputError(
            f"--exp-path: {run_dir} is no folder; a run's folder, with checkpoints/, is needed (public: "
            "`hf download REPA-E/sit-repae-vavae`)"
        )
    if train_steps is not None and not train_steps.isdecimal():
        raise InputError(f"--train-steps: {train_steps!r} was given; a number of steps is needed")
    step = int(train_steps) if train_steps is not None else latest_step(run_dir)
    if step is None:
        raise InputError(f"--exp-path: {run_dir} holds no checkpoint (checkpoints/<step>.pt)")
    path = checkpoint_path(run_dir, step)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.pt"))) or "none"
        raise InputError(f"--train-steps: {path} does not exist; checkpoints there: {there}")
    return path


def _stored_args(run_dir: Path) -> dict:
    file = run_dir / "args.json"
    try:
        args = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        args = None
    if not isinstance(args, dict):
        raise InputError(f"--exp-path: {file} holds no JSON object; the options of the training run are needed")
    return args


def _load_sit(state: dict, args: dict, path: Path) -> SiT:
    size = str(args.get("model", "")).removeprefix("SiT-").split("/")[0]
    try:
        config = config_of_state_dict(
            state, num_heads=SIT_SIZES.get(size, {}).get("num_heads"), num_classes=args.get("num_classes")
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no SiT that this code knows ({error})") from None
    sit = SiT(**config).eval().requires_grad_(False)
    load_strictly(sit, state, f"{path}: SiT")
    return sit


def _find_vae(checkpoint: dict, args: dict, path: Path, vae_ckpt: str | Path | None) -> Path | None:
    """Where the VAE lies that `vae_ckpt` names, else the one that the run was trained with; None: in the checkpoint."""
    if vae_ckpt is None and "vae" in checkpoint:
        return None
    found = vae_ckpt or args.get("vae_ckpt")
    if found is None:
        raise InputError(f"--vae-ckpt: {path} holds no VAE and its args name none; give the one it was trained with")
    return Path(found)


def _latent_stats(checkpoint: dict, vae: AutoencoderKL, vae_path: Path | None) -> tuple[Tensor, Tensor]:
    """Scale and bias, (1, C, 1, 1): of the EMA for REPA-E checkpoints; for LDM-only those stored with the VAE, else of
    the frozen `model` (the float32 EMA of a constant drifts)."""
    jointly = "vae" in checkpoint
    stored = None if jointly else latent_statistics(vae_path, vae)
    if stored is not None:
        return stored
    norm = checkpoint["ema" if jointly else "model"]
    # Copies: the checkpoint is memory-mapped.
    return norm["bn.running_var"].rsqrt().view(1, -1, 1, 1), norm["bn.running_mean"].clone().view(1, -1, 1, 1)
