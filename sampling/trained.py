"""A trained run, ours or public, as what sampling needs: SiT, the decoder, the latent statistics."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dataset.latents import difference
from models.sit import SIT_SIZES, SiT
from models.sit_files import SWIGLU, config_of_state_dict, find_sit_state, latent_stats_of
from models.vae import (
    downsampling,
    latent_channels,
    latent_statistics,
    load_vae,
    read_latent_statistics,
    vae_models,
)
from models.vae_files import vae_of_checkpoint
from models.vae_names import is_hub_name
from utils.checkpoint import read_checkpoint
from utils.checkpoint_files import trained_checkpoint
from utils.errors import InputError, about
from utils.files import read_object, require_kinds
from utils.modules import load_strictly

BN = BN_MEAN, BN_VARIANCE = "bn.running_mean", "bn.running_var"
PATHS = ("linear", "cosine")
_KINDS = dict(model=str, num_classes=int, path_type=str, seen_classes=str, vae=str, vae_ckpt=str)
SD_VAE_CHANNELS, SD_VAE_SCALE = 4, 0.18215  # as SiT and REPA multiply SD-VAE's latents


@dataclass
class TrainedRun:
    """What sampling needs of a run's checkpoint; networks in evaluation mode, on the CPU until `to`.

    Attributes:
        name, step: of the run, and of its checkpoint; `checkpoint` is the file.
        args: what it was trained with.
        sit: the EMA, or the raw weights.
        vae: `vae_path` is its file, or None where the checkpoint holds it.
        latent_stats: scale and bias (1, C, 1, 1), which undo the normaliser that SiT was trained under.
        notes: what was taken for what, where a user could think otherwise.
    """

    name: str
    step: int
    checkpoint: Path
    args: dict
    sit: SiT
    vae: AutoencoderKL
    vae_path: Path | None
    latent_stats: tuple[Tensor, Tensor]
    notes: list[str]

    @property
    def resolution(self) -> int:
        """Side of the images, in pixels."""
        return self.sit.grid * self.sit.patch_size * downsampling(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.sit.grid * self.sit.patch_size
        return self.sit.in_channels, side, side

    def to(self, device: torch.device) -> None:
        self.sit.to(device)
        self.vae.to(device)
        self.latent_stats = tuple(values.to(device) for values in self.latent_stats)


def load_trained(
    exp_path: str | Path,
    train_steps: str | None = None,
    vae_ckpt: str | Path | None = None,
    *,
    ema: bool = True,
    by_shape: bool = False,
) -> TrainedRun:
    """SiT, VAE and latent statistics of a checkpoint: ours, public, REPA's or SiT's. No encoder is loaded.

    Args:
        exp_path: the run's folder, or a checkpoint by itself (`--exp-path`).
        train_steps: which checkpoint (`--train-steps`); the latest when None.
        vae_ckpt: a VAE instead of the checkpoint's own or the one its args name (`--vae-ckpt`).
        ema: SiT's moving average, else its raw weights.
        by_shape: give SiT the shapes of its weights alone, on the meta device.

    Raises:
        InputError: no such run or checkpoint, or one whose parts do not fit each other.
    """
    path = trained_checkpoint(exp_path, train_steps)
    contents = read_checkpoint(path, need=())
    args = _stored_args(_run_folder(path)) | contents.pop("args")
    args = {key: value for key, value in args.items() if value is not None}
    require_kinds(args, f"the training options of {path}", **_KINDS)
    if (path_type := args.get("path_type", PATHS[0])) not in PATHS:
        raise InputError(f"the training options of {path}: path_type is {path_type!r}; {' or '.join(PATHS)} is needed")
    state, notes = find_sit_state(contents, path, ema=ema)
    with torch.device("meta") if by_shape else contextlib.nullcontext():
        weights = {key: value.to("meta") for key, value in state.items()} if by_shape else state
        sit = _build_sit(weights, args, path)

    vae_path = _find_vae(contents, args, path, vae_ckpt)
    if vae_path is None:
        vae = vae_of_checkpoint(contents | {"args": args}, path)
    elif vae_ckpt is not None:
        vae = load_vae("auto", vae_path, say=notes.append)
    else:
        vae = _load_vae_of_args(args, vae_path, path, notes)
    if latent_channels(vae) != sit.in_channels:
        needed = f"the SiT of {path} needs {sit.in_channels}"
        raise InputError(f"--vae-ckpt: the VAE has {latent_channels(vae)} latent channels; {needed}")

    latent_stats, more = _latent_stats(contents, state, path, vae, vae_path)
    sit.set_latent_stats(*latent_stats)
    return TrainedRun(
        name=_run_name(Path(exp_path)),
        step=_step(contents, path),
        checkpoint=path,
        args=args,
        sit=sit,
        vae=vae.requires_grad_(False),
        vae_path=vae_path,
        latent_stats=latent_stats,
        notes=notes + more,
    )


def _run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None for a file by itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def _run_name(exp_path: Path) -> str:
    """Of a run its folder's, also where a checkpoint in it is named; of a file by itself its own."""
    folder = exp_path if exp_path.is_dir() else _run_folder(exp_path.resolve())
    return exp_path.stem if folder is None else folder.resolve().name


def _stored_args(run_dir: Path | None) -> dict:
    if run_dir is None:
        return {}
    file = run_dir / "args.json"
    with about("--exp-path"):
        return read_object(file) if file.is_file() else {}


def _step(contents: dict, path: Path) -> int:
    """Of the file's name, as in a run's folder; else as the checkpoint says; else 0."""
    steps = path.stem if path.stem.isdecimal() else contents.get("steps", 0)
    return int(steps) if str(steps).isdecimal() else 0


def _build_sit(state: dict[str, Tensor], args: dict, path: Path) -> SiT:
    """A SiT with these weights; its normaliser, which REPA's and the original SiT lack, is the caller's to set."""
    size = str(args.get("model", "")).removeprefix("SiT-").split("/")[0]
    try:
        config = config_of_state_dict(
            state, num_heads=SIT_SIZES.get(size, {}).get("num_heads"), num_classes=args.get("num_classes")
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no SiT that this code knows ({error})") from None
    sit = SiT(**config).eval().requires_grad_(False)
    if BN_VARIANCE not in state:
        state = state | {key: value for key, value in sit.state_dict().items() if key.startswith("bn.")}
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


def _load_vae_of_args(args: dict, vae_path: Path, path: Path, notes: list[str]) -> AutoencoderKL:
    """The VAE that a checkpoint's args name, in errors too: nobody gave it here, and it may have moved since."""
    arch = args.get("vae") if args.get("vae") in vae_models else "auto"
    needed = "give the VAE that it was trained with as --vae-ckpt"
    if not vae_path.exists() and not (arch == "auto" and is_hub_name(str(vae_path))):
        raise InputError(f"{path}: its args name the VAE {vae_path}, which does not exist; {needed}")
    try:
        return load_vae(arch, vae_path, say=notes.append)
    except InputError as error:
        problem = str(error).removeprefix("--vae-ckpt: ")
        raise InputError(f"{path}: its args name a VAE that cannot be used: {problem}; {needed}") from None


def _latent_stats(
    contents: dict, state: dict[str, Tensor], path: Path, vae: AutoencoderKL, vae_path: Path | None
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Scale and bias (1, C, 1, 1) that the weights were trained under, and notes on what else could have been meant.

    They are those of the weights that are sampled: the EMA's, or the raw ones, of a REPA-E checkpoint; of an LDM-only
    one the frozen normaliser of `model`, because the float32 EMA of a constant drifts.
    """
    stored = None if vae_path is None else latent_statistics(vae_path, vae)
    if BN_VARIANCE in state:
        jointly = "vae" in contents
        norm = state if jointly or "model" not in contents else find_sit_state(contents, path, ema=False)[0]
        if any(norm[key].shape != state[key].shape for key in BN if key in norm) or not norm.keys() >= {*BN}:
            raise InputError(f"{path}: model has no normaliser as the average's; {' and '.join(BN)} are needed")
        own = latent_stats_of(norm)
        apart = None if stored is None else difference(own, stored)
        if apart is None:
            return own, []
        return own, [f"the latent statistics of {path} count; those stored with {vae_path} differ {apart}"]

    # LightningDiT's lie beside its file.
    beside = path.with_name("latents_stats.pt")
    if SWIGLU in state and beside.is_file():
        with about("--exp-path"):
            own = read_latent_statistics(beside, vae)
        return own, [f"{path} carries no latent statistics: those of {beside} are used"]

    # REPA's and the original SiT carry none. On SD-VAE they are trained under its one scale, whatever lies beside it.
    if latent_channels(vae) == SD_VAE_CHANNELS:
        ones = torch.ones(1, SD_VAE_CHANNELS, 1, 1)
        sd_vae = SD_VAE_SCALE * ones, 0 * ones
        note = f"{path} carries no latent statistics: SD-VAE's scale {SD_VAE_SCALE} is used, as SiT and REPA do"
        apart = None if stored is None else difference(sd_vae, stored)
        return sd_vae, [note if apart is None else f"{note}; those stored with {vae_path} differ {apart}"]
    if stored is None:
        more = f"; {beside.name} of LightningDiT belongs beside the former" if SWIGLU in state else ""
        raise InputError(f"--vae-ckpt: neither {path} nor {vae_path} carries latent statistics{more}")
    return stored, [f"{path} carries no latent statistics: those stored with {vae_path} are used"]
