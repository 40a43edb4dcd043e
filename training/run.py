"""A training run: its processes, its folder, its random draws, its log."""

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset.order import batches, batches_per_epoch
from training.trackers import open_trackers
from utils.checkpoint import checkpoint_path, latest_step, read_checkpoint, write_checkpoint
from utils.distributed import from_main, main_first, start_processes
from utils.errors import InputError
from utils.files import require_disk, require_writable, write_json
from utils.images import save_png
from utils.rng import Draws

logger = logging.getLogger(__name__)

# What a run puts into its folder; `--overwrite` removes these and nothing else.
RUN_FILES = ("args.json", "checkpoints", "samples", "metrics.jsonl", "evaluations.jsonl", "log.txt", "latents-stats.pt")
PROGRESS_LOSSES = ("sit_loss", "vae_loss", "proj_loss", "reconstruction_loss")


class Run:
    """One training run, as every process sees it.

    Attributes:
        rank, world_size, is_main, device: of this process.
        folder: `<output-dir>/<exp-name>`.
        start_step: step to go on from (0 for a fresh run); `resume_from` is its checkpoint, or None; `goes_on` tells
            whether that lies in the run's own folder.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = start_processes()
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.folder = Path(args.output_dir) / args.exp_name
        self.trackers = []
        self._window, self._window_steps, self._window_seconds = None, 0, 0.0
        self._set_numerics()
        with main_first():
            if args.batch_size % self.world_size:
                raise InputError(f"--batch-size: {args.batch_size} images do not divide by {self.world_size} processes")
            self.start_step, self.resume_from = self._resume_point()
            source = self.resume_from and self.resume_from.parent.parent
            self.goes_on = source is not None and source.resolve() == self.folder.resolve()
            if not self.goes_on:
                self._check_folder_is_free()

    # ------------------------------------------------------------------ processes

    def wrap(self, module: nn.Module) -> nn.Module:
        """The network whose forward synchronises gradients. Buffers are not broadcast: the latents' normaliser keeps
        itself equal, and the discriminator's BatchNorm stays per process, as in the public code."""
        if self.world_size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def synchronised(self, *modules: nn.Module, when: bool) -> contextlib.ExitStack:
        """Within it, backward passes of wrapped networks average gradients over processes only `when` true."""
        stack = contextlib.ExitStack()
        for module in modules:
            if not when and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        return stack

    def to_device(self, *modules: nn.Module | None) -> None:
        """Move modules to this process's device; None stands for one that the run does without."""
        for module in modules:
            if module is not None:
                module.to(self.device)

    # ------------------------------------------------------------------ numerics

    def _set_numerics(self) -> None:
        args = self.args
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        self.autocast_dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
        self.notes = []
        if self.autocast_dtype is torch.float16 and self.device.type != "cuda":
            self.autocast_dtype = None
            self.notes.append("--mixed-precision fp16 needs CUDA: this run computes in float32")
        if args.compile is None:
            args.compile = self.device.type == "cuda"
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False

    def autocast(self) -> torch.autocast:
        """For network passes; losses stay outside."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled)

    @property
    def scales_loss(self) -> bool:
        return self.autocast_dtype is torch.float16

    def draws(self, step: int, micro_step: int) -> Draws:
        return Draws(self.args.seed, step, micro_step, self.args.batch_size, self.rank, self.world_size, self.device)

    # ------------------------------------------------------------------ data

    def batches(self, data) -> Iterator:
        """This process's micro-batches of a data set, from the step where the run starts."""
        args = self.args
        return batches(
            data,
            batch_size=args.batch_size,
            seed=args.seed,
            rank=self.rank,
            world_size=self.world_size,
            start=self.start_step * args.gradient_accumulation_steps,
            num_workers=args.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    # ------------------------------------------------------------------ the loop

    def steps(
        self,
        data,
        *,
        checkpoint: Callable[[int], dict],
        evaluate: Callable[[], dict[str, float]] | None = None,
        preview: Callable[[], dict[str, np.ndarray]] | None = None,
    ) -> Iterator[int]:
        """The steps that are left, counted from 0; after each of them, what is due is done.

        The body of the loop trains one step and hands its scalars to `log`.

        Args:
            data: the data set, whose length makes an epoch; --epochs and --max-train-steps both end the run.
            checkpoint: contents of the checkpoint after so many steps; called on rank 0.
            evaluate: metrics, the same on every process; called on all of them.
            preview: pictures uint8 (H, W, 3) by name; called on all processes, and rank 0's are kept.
        """
        args = self.args
        in_epoch = max(batches_per_epoch(len(data), args.batch_size) // args.gradient_accumulation_steps, 1)
        self.total_steps = min(args.max_train_steps, args.epochs * in_epoch)
        if evaluate is not None and self._lacks_evaluation(args.eval_steps):
            self.log_evaluation(self.start_step, evaluate())

        steps = range(self.start_step, self.total_steps)
        self._progress = tqdm(
            steps, initial=self.start_step, total=self.total_steps, disable=not self.is_main, desc=args.exp_name
        )
        for step in self._progress:
            # The clock of `images_per_second` counts steps alone: not the checkpoints and evaluations between them.
            self._clock = time.perf_counter()
            yield step

            done = step + 1
            if self._is_due(done, args.checkpointing_steps):
                self.save(done, partial(checkpoint, done))
            if evaluate is not None and self._is_due(done, args.eval_steps):
                self.log_evaluation(done, evaluate())
            if preview is not None and args.num_preview and self._is_due(done, args.sampling_steps):
                self.log_pictures(done, preview())

    def _is_due(self, done: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after `done` steps."""
        return done % every == 0 or done == self.total_steps

    def _lacks_evaluation(self, every: int) -> bool:
        """Whether the run goes on from a step whose evaluation is due but not on file: the job ended within it."""
        if not (self.goes_on and self._is_due(self.start_step, every)):
            return False
        path = self.folder / "evaluations.jsonl"  # rank 0 wrote it; others may not see it as it is now
        rows = path.read_text().splitlines() if self.is_main and path.is_file() else []
        return from_main(all(json.loads(row)["step"] != self.start_step for row in rows))

    # ------------------------------------------------------------------ the folder

    def _resume_point(self) -> tuple[int, Path | None]:
        args = self.args
        if args.resume is not None and args.resume_step:
            raise InputError("--resume and --resume-step were both given; one is needed")
        if args.resume is not None and args.resume != "latest" and not args.resume.isdigit():
            raise InputError(f"--resume: {args.resume!r} was given; 'latest' or a step is needed")
        source = Path(args.continue_train_exp_dir or self.folder)
        step = args.resume_step or args.resume
        if step == "latest":
            step = latest_step(source)
            if step is None:  # so that a cluster job may always be started with --resume latest
                return 0, None
        if not step:
            return 0, None
        path = checkpoint_path(source, step)
        if not path.is_file():
            steps = sorted(file.stem for file in path.parent.glob("*.pt"))
            raise InputError(f"--resume: {path} does not exist; checkpoints there: {', '.join(steps) or 'none'}")
        return int(step), path

    def _check_folder_is_free(self) -> None:
        args, folder = self.args, self.folder
        restarting = args.resume == "latest"  # an earlier job may have died before its first checkpoint
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--exp-name: {folder} is a file")
        require_writable(folder / "args.json", "--output-dir")
        if not folder.exists() or not any(folder.iterdir()) or (restarting and (folder / "args.json").is_file()):
            return
        if not args.overwrite:
            raise InputError(f"--exp-name: {folder} exists already; give another name, --resume latest or --overwrite")
        if not (folder / "args.json").is_file():
            raise InputError(f"--overwrite: {folder} has no args.json, so it is no run folder and is left alone")

    def checkpoint(self, need: tuple[str, ...]) -> dict | None:
        """The checkpoint that the run resumes, with these entries at least; None for a fresh run."""
        return read_checkpoint(self.resume_from, need=need) if self.resume_from else None

    def require_room(self, trained: list[nn.Module], copies: list[nn.Module]) -> None:
        """Refuse to start where not even one checkpoint fits: networks with two moments each, and copies without."""
        size = sum(tensor.nbytes for module in trained for tensor in module.parameters()) * 3
        size += sum(tensor.nbytes for module in copies for tensor in module.parameters())
        require_disk(self.folder, size, "--output-dir: a checkpoint")

    def open_folder(self) -> None:
        """Make the folder, args.json, the log and the tracker. Everything that can be checked has been."""
        args = self.args
        if self.is_main:
            if args.overwrite and not self.goes_on:
                for name in (*RUN_FILES, args.logging_dir):
                    path = self.folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            if self.goes_on and (self.folder / "args.json").is_file():
                self._note_changes(json.loads((self.folder / "args.json").read_text()))
            for unfinished in (self.folder / "checkpoints").glob("*.tmp-*"):  # of a job that was killed
                unfinished.unlink()
            write_json(self.folder / "args.json", vars(args))
            self._forget_metrics_after(self.start_step)
            self._open_log()
            self.trackers = open_trackers(args, self.folder)
            for note in self.notes:
                logger.warning(note)
        self.wait()

    def _note_changes(self, before: dict) -> None:
        """Flags of the run's earlier part that have other values now, apart from those that say how it goes on."""
        free = ("resume", "resume_step", "continue_train_exp_dir", "overwrite")
        for key, value in vars(self.args).items():
            if key not in free and key in before and before[key] != value:
                self.notes.append(
                    f"--{key.replace('_', '-')} was {before[key]} until step {self.start_step}; now {value}"
                )

    def _open_log(self) -> None:
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        self._handlers = [logging.FileHandler(self.folder / "log.txt"), logging.StreamHandler(sys.stderr)]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            root.addHandler(handler)
        for noisy in ("httpx", "filelock", "PIL", "wandb"):
            logging.getLogger(noisy).setLevel(logging.WARNING)

    def _forget_metrics_after(self, step: int) -> None:
        """A run that goes on from an earlier step writes the rows after it again."""
        for path in filter(Path.is_file, (self.folder / "metrics.jsonl", self.folder / "evaluations.jsonl")):
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed job may leave a part of one
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))

    # ------------------------------------------------------------------ what it reports

    def log(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Collect the scalars of a step; every --log-steps, and at every checkpoint, average and report them.

        The scalars stay on the device in between, and one collective a report brings all of them together.

        Args:
            step: as `steps` gives it, from 0; the row is that of step + 1 steps.
            scalars: by name, of this process.

        Raises:
            FloatingPointError: a loss of the row is not finite.
        """
        tensors = [torch.as_tensor(value, device=self.device).detach().float() for value in scalars.values()]
        values = torch.stack(tensors)
        self._window = values if self._window is None else self._window + values
        self._window_steps += 1
        self._window_seconds += time.perf_counter() - self._clock

        # A window also ends with a checkpoint: no loss that is not finite is saved, and a resumed run has equal rows.
        args, done = self.args, step + 1
        if not (self._is_due(done, args.log_steps) or self._is_due(done, args.checkpointing_steps)):
            return
        if self.world_size > 1:
            dist.all_reduce(self._window)
        means = (self._window / (self._window_steps * self.world_size)).tolist()
        row = dict(zip(scalars, means, strict=True))
        images = args.batch_size * args.gradient_accumulation_steps * self._window_steps
        row["images_per_second"] = images / self._window_seconds
        if self.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._window, self._window_steps, self._window_seconds = None, 0, 0.0

        if self.is_main:
            self._append("metrics.jsonl", done, row)
            self._progress.set_postfix({key: f"{row[key]:.4f}" for key in PROGRESS_LOSSES if key in row})
        losses = {key: value for key, value in row.items() if key.endswith("loss")}
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"step {done}: a loss is not finite ({losses}); checkpoints before it are whole")

    def log_evaluation(self, done: int, results: dict[str, float]) -> None:
        """Metrics of an evaluation to `evaluations.jsonl`, the log and the tracker; on rank 0."""
        if self.is_main:
            self._append("evaluations.jsonl", done, results)
            logger.info("step %d: %s", done, ", ".join(f"{name} {value:.4g}" for name, value in results.items()))

    def log_pictures(self, done: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures uint8 (H, W, 3) by name, to `samples/` and to the tracker; on rank 0, and the others wait."""
        for name, picture in pictures.items() if self.is_main else ():
            save_png(picture, self.folder / "samples" / f"{done:07d}-{name}.png")
            for tracker in self.trackers:
                tracker.log_images({name: picture[None]}, step=done)
        self.wait()

    def save(self, done: int, contents: Callable[[], dict]) -> None:
        """Write the checkpoint after so many steps, on rank 0; the others wait."""
        if self.is_main:
            write_checkpoint(checkpoint_path(self.folder, done), contents())
        self.wait()

    def _append(self, file: str, done: int, row: dict[str, float]) -> None:
        with (self.folder / file).open("a") as lines:
            lines.write(json.dumps({"step": done, **row}) + "\n")
        for tracker in self.trackers:
            tracker.log(row, step=done)

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        self.wait()
        for tracker in self.trackers:
            tracker.finish()
        for handler in getattr(self, "_handlers", []):
            logging.getLogger().removeHandler(handler)
            handler.close()
