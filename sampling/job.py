"""A sampling job: what is drawn of which trained run, what its images depend on, and what its result is called."""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.arguments import generate_parser
from configs.parsing import flag_of
from dataset.classes import class_ranges
from models.interpolant import resolve_time_shift, time_shift_notes
from models.sit import SiT
from models.vae_files import vae_sha256
from sampling.generation import AUTOCAST, SamplerConfig, decode_latents, sample_latents, trajectory
from sampling.guide import load_guide
from sampling.labels import LabelScheme, label_scheme, seen_classes
from sampling.trained import TrainedRun
from utils.background import HostCopy, to_device
from utils.errors import InputError
from utils.files import sha256

# Options that the images do not depend on: an interrupted job may be taken up with others. (--preset, --train-steps and
# --tf32 count through what they come to, and files through their checksums.)
FREE = {
    "preset",
    "exp_path",
    "train_steps",
    "guide_exp_path",
    "guide_train_steps",
    "vae_ckpt",
    "label_file",
    "sample_dir",
    "overwrite",
    "dry_run",
    "save_png",
    "grid",
    "trajectory",
    "evaluate",
    "features",
    "inception_weights",
    "enc_ckpt",
    "tf32",
}


@dataclass(frozen=True)
class SamplingJob:
    """What generate.py was asked for.

    Attributes:
        args: its options.
        trained: the run that is sampled.
        sampler: how a sample is drawn.
        labels: the label of every sample.
        notes: what was chosen without being asked for; they are said at the start and recorded.
        guide: a weaker run of the same latents that guides the samples; None: classifier-free guidance, if any.
    """

    args: argparse.Namespace
    trained: TrainedRun
    sampler: SamplerConfig
    labels: LabelScheme
    notes: list[str]
    guide: TrainedRun | None = None

    @property
    def networks(self) -> list[SiT]:
        """That of the run, and the guide's."""
        return [run.sit for run in (self.trained, self.guide) if run is not None]

    def to(self, device: torch.device) -> None:
        self.trained.to(device)
        for network in self.networks:
            network.to(device)

    def begin(self, indices: range, watch: Callable[[int, Tensor], None] | None = None) -> Callable[[], np.ndarray]:
        """Give the device the work of drawing these sample numbers; on CUDA nothing here waits for it.

        Args:
            watch: as `sample_latents` takes it.

        Returns:
            What waits for the images, uint8 (B, H, W, 3), and gives them. It raises an InputError where a sample is not
            finite.
        """
        sit, vae, latent_stats, *numbers = self._drawn(indices)
        x_0 = sample_latents(sit, *numbers, watch, *self.networks[1:])
        finite = HostCopy(x_0.isfinite().all())
        images = HostCopy(decode_latents(vae, x_0, *latent_stats).permute(0, 2, 3, 1).contiguous())

        def finished() -> np.ndarray:
            if not finite.wait():
                fp16 = self.sampler.precision == "fp16"
                reason = "they left fp16's range: --precision bf16" if fp16 else "look at its training"
                found = f"{self.trained.checkpoint} gives samples that are not finite"
                raise InputError(f"--exp-path: {found} ({reason})")
            return images.wait().numpy()

        return finished

    def trajectory(self, indices: range, shown: int) -> Tensor:
        """The first samples of a batch on their way from noise, uint8 (shown, frames, 3, H, W)."""
        return trajectory(*self._drawn(indices), shown=shown, guide=self.guide and self.guide.sit)

    def _drawn(self, indices: range) -> tuple:
        trained = self.trained
        labels = to_device(self.labels(indices), trained.sit.pos_embed.device)
        return trained.sit, trained.vae, trained.latent_stats, indices, labels, self.labels.seed, self.sampler

    def description(self, device: torch.device) -> dict:
        """All that the images depend on, as JSON values: an interrupted job and the one that takes it up share it."""
        args, trained = self.args, self.trained
        options = {key: value for key, value in vars(args).items() if key not in FREE}
        options |= {"precision": precision_name(args), "path_type": trained.args.get("path_type", args.path_type)}

        checksums = {"checkpoint": sha256(trained.checkpoint)}
        if trained.vae_path is not None:
            checksums["vae"] = vae_sha256(trained.vae_path, trained.vae)
        if self.guide is not None:
            checksums["guide"] = sha256(self.guide.checkpoint)
        if args.label_file is not None:
            checksums["label_file"] = sha256(args.label_file)
        statistics = b"".join(values.numpy().tobytes() for values in trained.latent_stats)
        checksums["latent_statistics"] = hashlib.sha256(statistics).hexdigest()

        description = {
            "run": trained.name,
            "step": trained.step,
            "options": options,
            "sha256": checksums,
            "device": device.type,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "versions": {"torch": torch.__version__, **_versions("numpy", "diffusers", "timm")},
        }
        return json.loads(json.dumps(description))

    def record(self, processes) -> dict:
        """What the result's `.json` says beyond the description; `processes` is `start_processes`' accelerator."""
        trained, device = self.trained, processes.device
        python = {"python": platform.python_version(), "torch": torch.__version__}
        return {
            "checkpoint": str(trained.checkpoint),
            "vae": str(trained.vae_path or "in the checkpoint"),
            "guide": self.guide and str(self.guide.checkpoint),
            "options": vars(self.args),
            "sampler": asdict(self.sampler),
            "nfe": self.sampler.nfe(),
            "labels": self.labels.name,
            "notes": self.notes,
            "resolution": trained.resolution,
            "processes": processes.num_processes,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "versions": python | _versions("numpy", "diffusers", "timm", "accelerate"),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def sampling_job(args: argparse.Namespace, trained: TrainedRun) -> SamplingJob:
    """The job that the options of generate.py ask for.

    Raises:
        InputError: options that this model cannot serve.
    """
    guide = load_guide(args, trained)
    if args.cfg_scale > 1 and guide is None and trained.sit.null_label is None:
        model_has = "which was trained without label dropping (--cfg-prob 0) and has no null label"
        raise InputError(f"--cfg-scale: {args.cfg_scale} was given; 1 is needed by this model, {model_has}")
    path_type = trained.args.get("path_type", args.path_type)
    if args.mode == "sde" and path_type != args.path_type:  # along the ODE the velocity alone counts
        raise InputError(f"--path-type: {args.path_type} was given; this model was trained with {path_type}")
    latent_shape = trained.latent_shape
    if (args.guidance_channels or 0) > latent_shape[0]:
        raise InputError(f"--guidance-channels: {args.guidance_channels} was given; the latents have {latent_shape[0]}")
    sampler = SamplerConfig(
        mode=args.mode,
        heun=args.heun,
        num_steps=args.num_steps,
        time_shift=resolve_time_shift(args.time_shift, latent_shape),
        path_type=path_type,
        guidance_scale=args.cfg_scale,
        guidance_interval=(args.guidance_low, args.guidance_high),
        guidance_channels=args.guidance_channels,
        precision=precision_name(args),
    )
    seen = seen_classes(trained.args, trained.sit.num_classes)
    labels = label_scheme(args, trained.sit.num_classes, seen=seen, null_label=trained.sit.null_label)
    notes = [*trained.notes, *time_shift_notes(args.time_shift, latent_shape)]
    notes += [*(guide.notes if guide else ()), *_notes_on_classes(labels, seen, trained.sit)]
    return SamplingJob(args, trained, sampler, labels, notes, guide)


def _notes_on_classes(labels: LabelScheme, seen: np.ndarray, sit: SiT) -> list[str]:
    """Where the classes that are drawn are not simply all of the model's, or were never trained."""
    if labels.name == "null" or len(seen) == sit.num_classes:
        return []
    unseen = np.setdiff1d(labels.classes, seen)
    if len(unseen):
        return [f"the classes {class_ranges(unseen)} are drawn, too, which the run never saw"]
    drawn, last = class_ranges(labels.classes), sit.num_classes - 1
    return [f"labels are drawn from classes that the run saw: {drawn} of 0-{last}"]


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, whatever the model."""
    if args.guidance_low >= args.guidance_high:
        raise InputError(
            f"--guidance-low: {args.guidance_low} was given; less than --guidance-high ({args.guidance_high}) is needed"
        )
    for flag in ("guide_exp_path", "guidance_channels"):
        if getattr(args, flag) is not None and args.cfg_scale == 1:
            raise InputError(f"{flag_of(flag)} was given, but --cfg-scale 1 switches guidance off")
    if args.guide_train_steps is not None and args.guide_exp_path is None:
        raise InputError("--guide-train-steps goes with --guide-exp-path, which was not given")
    if args.mode == "sde" and args.heun:
        raise InputError("--heun goes with --mode ode, not with --mode sde")
    if args.mode == "sde" and args.num_steps < 2:
        raise InputError(f"--num-steps: {args.num_steps} was given; --mode sde needs at least 2")
    chosen = [flag_of(name) for name in ("num_classes", "classes", "label_file") if getattr(args, name)]
    if len(chosen) > 1:
        raise InputError(f"{chosen[0]} and {chosen[1]} were both given; one is needed")
    if args.label_file and args.label_sampling == "equal":
        raise InputError("--label-sampling equal does not go with --label-file, which names the label of each sample")


def set_sampling_numerics(args: argparse.Namespace) -> None:
    """Equal shapes give equal bits; and --precision, or --tf32, for float32 code on CUDA."""
    allowed = args.tf32 if args.precision in (None, *AUTOCAST) else args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def precision_name(args: argparse.Namespace) -> str:
    return args.precision or ("tf32" if args.tf32 else "fp32")


# What the result is called


def output_name(args: argparse.Namespace, trained: TrainedRun, guide: TrainedRun | None = None) -> str:
    """`<run>_<step>_cfg<scale>-<low>-<high>`, with a suffix for every other option that is not the default.

    Of the options on which the bytes depend, --pproc-batch-size alone is left out: it moves a level in ten thousand.
    """
    parts = [f"{trained.name}_{trained.step:07d}_cfg{args.cfg_scale}-{args.guidance_low}-{args.guidance_high}"]
    default = generate_parser().get_default
    changed = {name: value for name, value in vars(args).items() if value != default(name)}
    if "mode" in changed or args.heun:
        parts.append("heun" if args.heun else args.mode)
    for name, form in _SUFFIXES.items():
        if name in changed:
            parts.append(form.format(changed[name]))
    if guide is not None:
        parts.append(f"guide-{guide.name}_{guide.step:07d}")
    if precision_name(args) != "tf32":
        parts.append(precision_name(args))
    if args.compile:
        parts.append("compile")
    if args.classes is not None:
        only = args.classes.replace(",", "-") if len(args.classes) < 40 else "-some-classes"
        parts.append("unconditional" if args.classes == "null" else f"only{only}")
    if args.label_file is not None:
        parts.append(f"labels-{Path(args.label_file).stem}")
    if args.vae_ckpt is not None:
        parts.append(f"vae-{Path(args.vae_ckpt).stem}")
    if not args.ema:
        parts.append("no-ema")
    return "_".join(parts).replace(" ", "")


_SUFFIXES = {
    "num_steps": "steps{}",
    "time_shift": "shift{}",
    "guidance_channels": "channels{}",
    "global_seed": "seed{}",
    "num_fid_samples": "n{}",
    "label_sampling": "{}",
    "num_classes": "classes{}",
}


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}
