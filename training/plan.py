"""The plan of a training run, for `--dry-run`: the cost of its step by shapes alone, its memory, disk and time.

Nothing is read but configurations and what describes the data; what is not there is assumed, and the plan says so. No
process group is started, and no file or folder is made.
"""

import argparse
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dataset.data import ImageData, LatentData
from dataset.order import batches_per_epoch
from models.vae import latent_shape
from training import run_folder
from training.optimizer import Optimizer
from training.parts import step_parts
from training.saver import those_that_stay
from utils.cards import card_peak
from utils.costs import aligned, flops_lines, gb, memory_lines, time_lines
from utils.counting import Cost, to_shapes
from utils.distributed import launched_rank, world_size
from utils.errors import InputError
from utils.parts import OTHER, Parts

IMAGENET = SimpleNamespace(count=1_281_167, num_classes=1000)
MOST_MICRO_STEPS = 2  # that are gone through; further ones cost the same


class PlannedRun:
    """What `train_step` and the builders of a training script ask of a `Run`, for shapes instead of numbers.

    Args:
        args: the script's options; `dry_run` is the number of processes (None: one).
    Attributes:
        args: a copy, which the script may complete.
        notes: what was assumed or chosen.
        start_step, total_steps, goes_on: as of a `Run`.
        micro_steps: that `count`'s step goes through.
        networks, flops, peak, peak_part, checkpoint_bytes: after `count`; networks by name, FLOPs of one image by part,
            `peak` and `peak_part` as of a `Cost`.

    Raises:
        InputError: what the run itself would refuse before it reads weights.
    """

    def __init__(self, args: argparse.Namespace):
        assert world_size() == 1, "a plan stands for processes that are not there: make it before any are started"
        self.args, self.processes = argparse.Namespace(**vars(args)), args.dry_run or 1
        self.device, self.notes, self.scales_loss = torch.device("cpu"), [], False
        if args.batch_size % self.processes:
            raise InputError(f"--batch-size: {args.batch_size} images do not divide by {self.processes} processes")
        self.start_step, self.resume_from, self.goes_on, *_ = run_folder.starting_point(args)

        self.data, self.latent_bytes = self._data(), 0
        in_epoch = max(batches_per_epoch(self.num_images, args.batch_size) // args.gradient_accumulation_steps, 1)
        self.total_steps = min(args.max_train_steps, (args.epochs or math.inf) * in_epoch)
        self.micro_steps = min(args.gradient_accumulation_steps, MOST_MICRO_STEPS)

    # ------------------------------------------------------------------ the data

    def _data(self) -> ImageData | None:
        args, folder = self.args, Path(self.args.data_dir)
        if folder.is_dir():
            data = ImageData(folder, resolution=args.resolution, num_classes=getattr(args, "num_classes", None))
            self.num_images = len(data)
            if self.num_images < args.batch_size:
                given = f"--batch-size: {args.batch_size} was given"
                raise InputError(f"{given}; the data set has {self.num_images} images, less than one batch")
        else:
            data, self.num_images = None, IMAGENET.count
            self.notes.append(f"no data folder {folder}: ImageNet's {self.num_images:,} images are assumed")
        if "num_classes" in args and args.num_classes is None:
            args.num_classes = (data or IMAGENET).num_classes
        return data

    def latents(self, vae: nn.Module) -> tuple[int, ...]:
        """Shape (C, h, w) of the cached latents; where there are none, of those that this VAE would give."""
        path = Path(self.args.data_dir) / self.args.vae_latents_name
        if self.data is not None and path.with_name(f"{path.name}.npy").is_file():
            array = LatentData(path, self.data).array
            self.latent_bytes = array.nbytes
            return array.shape[1] // 2, *array.shape[2:]
        self.notes.append(f"no latents {path}.npy: those of --vae are assumed, in float32")
        shape = latent_shape(vae, self.args.resolution)
        self.latent_bytes = 4 * self.num_images * 2 * math.prod(shape)
        return shape

    # ------------------------------------------------------------------ what a script asks of a run

    def to_device(self, *modules: nn.Module | None) -> None:
        """Give modules shapes in place of weights; None stands for one that the run does without."""
        for module in filter(None, modules):
            to_shapes(module)

    def images(self) -> tuple[Tensor, Tensor]:
        """This process's share of a micro-batch: images uint8 (B, 3, R, R) and labels int64 (B,)."""
        side = self.args.resolution
        images = torch.empty(self.share, 3, side, side, dtype=torch.uint8)
        return images, torch.empty(self.share, dtype=torch.int64)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)  # fp16 has the same sizes

    @property
    def half(self) -> bool:
        return self.args.mixed_precision != "no"

    def synchronised(self, *modules: nn.Module, when: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def draws(self, step: int, micro_step: int) -> SimpleNamespace:
        def draw(purpose: str, *shape: int) -> Tensor:
            return torch.empty(self.args.batch_size, *shape)[: self.share]  # of the global batch, as `utils.rng.Draws`

        return SimpleNamespace(normal=draw, uniform=draw)

    @property
    def share(self) -> int:
        """Images of a micro-step on one process."""
        return self.args.batch_size // self.processes

    # ------------------------------------------------------------------ one step, counted

    def count(
        self,
        step: Callable[[int], object],
        optimizers: Iterable[Optimizer],
        checkpoint: Callable[[], dict],
        *,
        every: int = 1,
        ema: nn.Module | None = None,
        beside: dict[str, nn.Module] | None = None,
        **networks,
    ) -> None:
        """Run a step on shapes, within `utils.counting.shapes_alone`; the plan then has its costs.

        Args:
            step: an optimiser step by its number, of `micro_steps` micro-steps.
            checkpoint: contents of a checkpoint.
            every: of so many steps the first is another than the rest; its memory is taken for that of all.
            ema: the moving average.
            beside: networks that lie on the device and take no part in the step, by name.
            networks: as `training.parts.step_parts` takes them.
        """
        optimizers = list(optimizers)
        self.networks = self._named(**networks) | (beside or {})
        state = {"weights": [x for module in self.networks.values() for x in _tensors(module)]}
        state["EMA"] = [] if ema is None else _tensors(ema)
        state["Adam's moments"] = [moment for optimizer in optimizers for moment in _moments(optimizer)]
        parts = Parts()
        with Cost(parts, state) as cost, step_parts(parts, optimizers, **networks):
            for parameter in [parameter for optimizer in optimizers for parameter in optimizer.parameters]:
                self._keep_gradient(parameter, cost)
            first = self.args.max_train_steps - self.args.max_train_steps % every  # late: no loss waits to begin
            step(first)
            self.peak, self.peak_part, of_first = cost.peak, cost.peak_part, Counter(cost.flops)
            if every > 1:
                step(first + 1)
        images = self.share * self.micro_steps * every
        rest = Counter(cost.flops) - of_first
        self.flops = {part: (of_first[part] + (every - 1) * rest[part]) / images for part in cost.flops}
        storages = {x.untyped_storage()._cdata: x for x in tree_leaves(checkpoint()) if isinstance(x, Tensor)}
        self.checkpoint_bytes = sum(x.untyped_storage().nbytes() for x in storages.values())

    def _named(self, *, encoders=(), sit=None, vae=None, lpips=None, discriminator=None) -> dict[str, nn.Module]:
        named = {"SiT": sit, "VAE": vae, "discriminator": discriminator, "LPIPS": lpips}
        named |= {encoder.name: encoder for encoder in encoders}
        return {name: module for name, module in named.items() if module is not None}

    def _keep_gradient(self, parameter: nn.Parameter, cost: Cost) -> None:
        """Of several processes the gradients lie in buckets, which stay (`Run.wrap`: gradient_as_bucket_view)."""
        if not parameter.requires_grad:
            return
        bucket = torch.empty_like(parameter) if self.processes > 1 else None
        if bucket is not None:
            cost.add(bucket, "gradients")

        def keep(parameter):
            if bucket is None:
                cost.add(parameter.grad, "gradients")
            else:
                parameter.grad = bucket

        parameter.register_post_accumulate_grad_hook(keep)

    # ------------------------------------------------------------------ the plan as text

    @property
    def flops_per_image(self) -> float:
        """Of a training step, forward and backward."""
        return sum(self.flops.values())

    def text(self) -> str:
        """The plan; after `count`."""
        paragraphs = [
            [f"note: {note}" for note in self.notes],
            self._job_lines(),
            self._network_lines(),
            [*flops_lines(self.flops, "image"), self._step_line()],
            [*memory_lines(self.peak), self._peak_line()],
            self._disk_lines(),
            time_lines(self._flops_left(), self.processes, half=self.half, tf32=self.args.allow_tf32, unit="days"),
        ]
        return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)

    @property
    def images_per_step(self) -> int:
        return self.args.batch_size * self.args.gradient_accumulation_steps

    def _flops_left(self) -> float:
        steps = max(self.total_steps - self.start_step, 0)
        return self.flops_per_image * self.images_per_step * steps

    def _job_lines(self) -> list[str]:
        args, share = self.args, f"{self.share} on each of {self.processes}"
        micro = f" in {args.gradient_accumulation_steps} micro-steps" if args.gradient_accumulation_steps > 1 else ""
        steps = f"{self.total_steps:,} steps of {self.images_per_step:,} images{micro} ({share})"
        passes = self.total_steps * self.images_per_step / self.num_images
        done = f"; {self.start_step:,} steps are done" if self.start_step else ""
        data = f"{passes:,.3g} passes over {self.num_images:,} images"
        return [f"{steps}, {data}, --mixed-precision {args.mixed_precision}{done}"]

    def _network_lines(self) -> list[str]:
        rows = [("million parameters", "", "")]
        for name, module in self.networks.items():
            parameters = list(module.parameters())
            trained = "trained" if any(parameter.requires_grad for parameter in parameters) else "frozen"
            rows.append((name, f"{sum(parameter.numel() for parameter in parameters) / 1e6:,.1f}", trained))
        return aligned(rows)

    def _step_line(self) -> str:
        step = self.flops_per_image * self.images_per_step
        return f"{step / 1e12:,.1f} TFLOP a step of all processes; a multiply-add is 2, and products alone count"

    def _peak_line(self) -> str:
        part = self.peak_part
        when = "between the parts" if part == OTHER else f"in {part.name}{' backward' if part.backward else ''}"
        return f"highest {when}; eager, without workspaces and fragmentation (compiled networks keep less)"

    def _disk_lines(self) -> list[str]:
        args = self.args
        rows = [("disk", ""), ("images", gb(self.num_images * 3 * args.resolution**2))]
        if self.latent_bytes:
            rows.append(("latents", gb(self.latent_bytes)))
        every, total = args.checkpointing_steps, self.total_steps
        written = [min(step, total) for step in range(every, total + every, every) if step > self.start_step]
        stay = len(those_that_stay(written, args.checkpoints_total_limit, args.keep_every))
        rows.append(("a checkpoint", gb(self.checkpoint_bytes)))
        if stay == len(written):
            rows.append((f"all {stay} of them", gb(stay * self.checkpoint_bytes)))
        else:
            rows.append(
                (f"the {stay} of {len(written)} that stay, and one more", gb((stay + 1) * self.checkpoint_bytes))
            )
        note = "while it is written, rank 0 holds a copy of a checkpoint in the machine's memory"
        return [*aligned(rows), note]


def flops_for_mfu(planned: Callable[[argparse.Namespace], PlannedRun], args: argparse.Namespace) -> float | None:
    """FLOPs of a training step per image, where a row of the log can show them as a share of the card's peak: on rank
    0, on a card whose peak is known. None elsewhere, and for a run that will be refused: it says so itself.

    Args:
        planned: the script's own; called before any process group is started.
    """
    if launched_rank() > 0 or card_peak(half=args.mixed_precision != "no", tf32=args.allow_tf32) is None:
        return None
    try:
        # What is computed again to save memory is no part of what a step needs.
        return planned(argparse.Namespace(**vars(args) | {"grad_checkpoint": []})).flops_per_image
    except InputError:
        return None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _moments(optimizer: Optimizer) -> list[Tensor]:
    """Adam's, made by a step, with the fused kernel that CUDA uses: it makes no copies."""
    for group in optimizer.adamw.param_groups:
        group["fused"] = True
    for parameter in optimizer.parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.adamw.step()
    optimizer.adamw.zero_grad(set_to_none=True)
    return [moment for state in optimizer.adamw.state.values() for moment in state.values()]
