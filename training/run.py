"""A training run: its processes, its numerics and random draws, its loop, and what it reports."""

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset.order import batches, batches_per_epoch
from training import run_folder
from training.ahead import Ahead
from training.health import on_all, require_learning, what_now
from training.numerics import AUTOCAST, how_it_computes, set_numerics
from training.optimizer import Optimizer
from training.reports import Lasting, Reports, finite
from training.saver import Saver, require_saved
from training.stopping import Stopping
from training.window import Window
from utils.cards import card_peak
from utils.checkpoint import read_checkpoint
from utils.checkpoint_files import latest_step
from utils.distributed import from_main, main_first, start_processes, together
from utils.errors import InputError, Interrupt
from utils.files import require_disk
from utils.locks import JobLock
from utils.memory import frozen_garbage, peak_gib
from utils.provenance import made_by
from utils.rng import Draws

logger = logging.getLogger(__name__)

STEPS_BEFORE_FREEZING = 3  # of the garbage collector: by then everything that lives as long as the run is there
PROGRESS_LOSSES = ("sit_loss", "vae_loss", "proj_loss", "reconstruction_loss")


class Run:
    """One training run, as every process sees it; a context manager, whose end closes what the run has opened.

    Args:
        args: the script's options.
        flops_per_image: of a training step, on rank 0 (`training.plan.flops_for_mfu`); None: a row has no MFU.

    Attributes:
        rank, world_size, is_main, device: of this process.
        folder: `<output-dir>/<exp-name>`.
        start_step: step to go on from (0 for a fresh run); `resume_from` is its checkpoint, or None; `goes_on` tells
            whether that lies in the run's own folder.
    """

    def __init__(self, args: argparse.Namespace, *, flops_per_image: float | None = None):
        self.args, self.flops_per_image = args, flops_per_image
        self.accelerator = start_processes()
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.folder = run_folder.run_folder(args)
        self.autocast_dtype, self.notes = AUTOCAST[args.mixed_precision], set_numerics(args, self.device)
        self._reports, self._saver = None, None  # on rank 0, once the folder is open
        self._window, self._stopping = Window(self.device), Stopping(args.max_hours, self._what_stays)
        self._lock = JobLock(self.folder / run_folder.LOCK)
        with main_first():
            if args.batch_size % self.world_size:
                raise InputError(f"--batch-size: {args.batch_size} images do not divide by {self.world_size} processes")
            if self.is_main:
                self._lock.require_free(self._taken())
                start = run_folder.starting_point(args, whole=True)
        self._start = from_main(start if self.is_main else None)
        self.start_step, self.resume_from, self.goes_on, notes, _ = self._start
        self.notes += notes
        with together():  # each has looked for itself
            if self.resume_from is not None and not self.resume_from.is_file():
                problem = f"rank 0 goes on from {self.resume_from}, which this process does not see"
                raise InputError(f"--resume: {problem}; --output-dir must be one folder for all machines")
        self._done, self._stopped_together, self._signals = self.start_step, False, contextlib.ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Close the trackers and the log, and let others have the folder. An error's way out waits for nobody else."""
        if not self._stopped_together:
            self._signals.close()
        at_once = bool(kind) and issubclass(kind, KeyboardInterrupt) and not self._stopped_together
        try:
            if kind is None:
                self._stopping.close()
                self.wait()
            if not at_once:
                self._settle()
            if self._reports is not None:
                self._reports.close()
        finally:
            if self._saver is None or self._saver.idle:  # else the folder is ours until the process has ended
                self._lock.release()
        if self._stopped_together:
            self.wait()  # a launcher ends the others, with rank 0 in its trackers, as soon as one has left
            self._signals.close()

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
        for module in filter(None, modules):
            module.to(self.device)

    def tune_convolutions(self, *modules: nn.Module | None) -> None:
        """For --tune-convolutions: weights and activations of these modules in channels_last, cuDNN's fastest way."""
        torch.backends.cudnn.benchmark = not self.args.deterministic
        for module in filter(None, modules):
            module.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------ numerics

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
        """This process's micro-batches of a data set, on its device, from the step where the run starts."""
        args, self._num_images = self.args, len(data)
        loader = batches(
            data,
            batch_size=args.batch_size,
            seed=args.seed,
            rank=self.rank,
            world_size=self.world_size,
            start=self.start_step * args.gradient_accumulation_steps,
            num_workers=args.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return Ahead(loader, self.device, self._window.add_wait)

    # ------------------------------------------------------------------ the loop

    def steps(
        self,
        data,
        *,
        optimizers: dict[str, Optimizer],
        checkpoint: Callable[[int], dict],
        evaluate: Callable[[], dict[str, float]] | None = None,
        preview: Callable[[], dict[str, np.ndarray]] | None = None,
    ) -> Iterator[int]:
        """The steps that are left, counted from 0; after each of them, what is due is done.

        The body of the loop trains one step and hands its scalars to `log`.

        Args:
            data: the data set, whose length makes an epoch; --epochs, where it is given, and --max-train-steps both end
                the run.
            optimizers: of the networks, by their short names; their gradient scalers are part of a row.
            checkpoint: contents of the checkpoint after so many steps; called on rank 0.
            evaluate: metrics, the same on every process; called on all of them.
            preview: pictures uint8 (H, W, 3) by name; called on all processes, and rank 0's are kept.
        """
        args = self.args
        in_epoch = max(batches_per_epoch(len(data), args.batch_size) // args.gradient_accumulation_steps, 1)
        self.total_steps = min(args.max_train_steps, (args.epochs or math.inf) * in_epoch)
        self._scalers = {name: optimizer.scaler for name, optimizer in optimizers.items() if self.scales_loss}
        self._say_length(in_epoch)
        if self.is_main:
            self._made_by = made_by(data_fingerprint=data.fingerprint)
            versions = ", ".join(map(" ".join, self._made_by["versions"].items()))
            logger.info("commit %s; %s; %s", self._made_by["commit"], versions, self._made_by["command"])
        if evaluate is not None and self._lacks(args.eval_steps, run_folder.lacks_evaluation):
            self.log_evaluation(self.start_step, evaluate())
        if preview is not None and args.num_preview and self._lacks(args.sampling_steps, run_folder.lacks_pictures):
            self.log_pictures(self.start_step, preview())

        steps, begun = range(self.start_step, self.total_steps), dict(initial=self.start_step, total=self.total_steps)
        self._progress = tqdm(steps, **begun, disable=not self.is_main, desc=args.exp_name, file=Lasting(sys.stderr))
        self._signals.enter_context(self._stopping.listening())  # until the run is closed, or its loop has ended
        with frozen_garbage() as freeze:
            for step in self._progress:
                self._window.start_step()
                yield step

                self._done = done = step + 1
                if done - self.start_step == STEPS_BEFORE_FREEZING:
                    freeze()
                stops = self._stopping.agreed() and done < self.total_steps
                saves = stops or self._is_due(done, args.checkpointing_steps)
                if saves:
                    self._save_unless_bad(done, partial(checkpoint, done))
                if stops:
                    raise self._stopped()

                evaluates = evaluate is not None and self._is_due(done, args.eval_steps)
                pictures = preview is not None and args.num_preview and self._is_due(done, args.sampling_steps)
                if evaluates:
                    self.log_evaluation(done, evaluate())
                if pictures:
                    self.log_pictures(done, preview())
                # Minutes may have gone by.
                if (evaluates or pictures) and done < self.total_steps and self._stopping.agreed(now=True):
                    if not saves:
                        self._save_unless_bad(done, partial(checkpoint, done))
                    raise self._stopped()
            require_saved(self._saver)
        self._signals.close()
        if self.is_main and self._cut_short:
            logger.warning("the run has ended: %s", self._cut_short)

    def _say_length(self, in_epoch: int) -> None:
        """Where the run does not come to --max-train-steps, or has nothing left to do, say so before it begins."""
        args, total = self.args, self.total_steps
        self._cut_short = None
        if total < args.max_train_steps:
            length = f"--epochs {args.epochs} is {total} steps of this data set ({in_epoch} an epoch)"
            self._cut_short = f"{length}, fewer than --max-train-steps {args.max_train_steps}"
        if self.is_main and self.start_step >= total:
            logger.warning("nothing is left to train: the run is at step %d, and ends at %d", self.start_step, total)
        elif self.is_main and self._cut_short:
            logger.warning("the run will end early: %s", self._cut_short)

    def _what_stays(self) -> str:
        """Of a run that ends at once, for whoever did it."""
        saved = latest_step(self.folder)
        if saved is None:
            return f"interrupted after step {self._done}; there is no checkpoint yet, and no step of it stays"
        return f"interrupted after step {self._done}; --resume latest goes on from its last checkpoint, of step {saved}"

    def _stopped(self) -> Interrupt:
        """How a run ends that was asked to stop, once its checkpoint is on the disk."""
        require_saved(self._saver)
        self._stopped_together = True
        cause, saved = self._stopping.cause or "a signal to another process", latest_step(self.folder)
        on = f"--resume latest goes on from its checkpoint, of step {saved}"
        stays = "there is no checkpoint" if saved is None else on
        return Interrupt(f"by {cause}, after step {self._done}; {stays}")

    def _is_due(self, done: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after `done` steps."""
        return done % every == 0 or done == self.total_steps

    def _lacks(self, every: int, lacks: Callable) -> bool:
        """Whether what is due at the step from which the run goes on is not in its folder, as rank 0 sees it."""
        due = self.goes_on and self._is_due(self.start_step, every)
        return due and from_main(self.is_main and lacks(self.folder, self.start_step))

    def _settle(self) -> None:
        """Wait for a checkpoint that is being written, on rank 0."""
        if self._saver is not None:
            self._saver.wait()

    # ------------------------------------------------------------------ the folder

    def read_checkpoint(self, need: tuple[str, ...]) -> dict | None:
        """The checkpoint that the run resumes, with these entries at least; None for a fresh run."""
        if self.resume_from is None:
            return None
        checkpoint = read_checkpoint(self.resume_from, need=need)
        self._window.load_state(checkpoint.get("window", {}))
        return checkpoint

    def require_room(self, trained: list[nn.Module], copies: list[nn.Module]) -> None:
        """Refuse to start where not even one checkpoint fits: networks with two moments each, and copies without."""
        size = sum(tensor.nbytes for module in trained for tensor in module.parameters()) * 3
        size += sum(tensor.nbytes for module in copies for tensor in module.parameters())
        require_disk(self.folder, size, "--output-dir: a checkpoint")

    def say_how(self, *, compiled: str) -> None:
        """One line on how the run computes, for its log; `compiled`: what is, where --compile holds."""
        if self.is_main:
            logger.info(how_it_computes(self.args, self.device, self.world_size, compiled=compiled))

    def open_folder(self, *, from_checkpoint: tuple[str, ...] = ()) -> None:
        """Make the folder, args.json, the log and the tracker. Everything that can be checked has been.

        Args:
            from_checkpoint: options of a fresh run that a resumed one does not read.
        """
        with main_first():
            if self.is_main:
                self._lock.acquire(self._taken())
                if run_folder.starting_point(self.args).there != self._start.there:
                    raise InputError(f"{self._taken()} while this one was starting; start it again")
        if self.is_main:
            if self.goes_on:
                self.notes += run_folder.changed_flags(self.folder, self.args, self.start_step, from_checkpoint)
                self.notes += run_folder.set_aside_after(self.folder, self.start_step)
            elif self.args.overwrite:
                run_folder.clear(self.folder, self.args.logging_dir)
            run_folder.make(self.folder, self.args, self.start_step)
            self._reports = Reports(self.args, self.folder, start_step=self.start_step)
            for note in self.notes:
                logger.warning(note)
            self._saver = Saver(
                self.folder,
                limit=self.args.checkpoints_total_limit,
                keep_every=self.args.keep_every,
                resumed_from=self.start_step if self.goes_on else None,
            )
        self.wait()

    def _taken(self) -> str:
        return f"--exp-name: another job is at work in {self.folder}"

    # ------------------------------------------------------------------ what it reports

    def log(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Collect the scalars of a step; every --log-steps, and at every checkpoint, average and report them.

        Args:
            step: as `steps` gives it, from 0; the row is that of step + 1 steps.
            scalars: by name, of this process.

        Raises:
            FloatingPointError: a network has stopped learning (`training.health`).
        """
        args, done = self.args, step + 1
        self._window.add(done, scalars)
        # A window also ends with a checkpoint: no loss that is not finite is saved, and a resumed run has equal rows.
        if not (self._is_due(done, args.log_steps) or self._is_due(done, args.checkpointing_steps)):
            return

        row = self._window.close(images_per_step=args.batch_size * args.gradient_accumulation_steps)
        if self.flops_per_image is not None:
            peak = self.world_size * card_peak(half=self.autocast_dtype is not None, tf32=args.allow_tf32)
            row["mfu"] = row["images_per_second"] * self.flops_per_image / peak
        row["peak_memory_gib"] = peak_gib(self.device)
        scales = {name: scaler.get_scale() for name, scaler in self._scalers.items()}
        row |= {f"loss_scale_{name}": scale for name, scale in scales.items()}
        if self.is_main:
            self._reports.row(run_folder.METRICS, done, row)
            known = finite(row)
            self._progress.set_postfix({key: f"{known[key]:.4f}" for key in PROGRESS_LOSSES if key in known})
        require_learning(self._window, done, scales, self.folder, self._num_images, args, self._settle)

    def log_evaluation(self, done: int, results: dict[str, float]) -> None:
        """Metrics of an evaluation to `evaluations.jsonl`, the log and the tracker; on rank 0."""
        if self.is_main:
            self._reports.evaluation(run_folder.EVALUATIONS, done, results)

    def log_pictures(self, done: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures uint8 (H, W, 3) by name, to `samples/` and to the tracker; on rank 0, and the others wait."""
        if self.is_main:
            self._reports.pictures(done, pictures)
        self.wait()

    def _save_unless_bad(self, done: int, contents: Callable[[], dict]) -> None:
        """Save, where the step's losses are finite: else say so, and at the end of the run it is an error."""
        window = self._window.state()  # of a stop between two rows
        if not (infinite := self._window.infinite_losses()):
            self.save(done, lambda: contents() | ({"window": window} if window else {}))
            return
        why = f"step {done}: no checkpoint is written; not finite: {', '.join(infinite)}"
        if done == self.total_steps:
            self._settle()
            raise on_all(FloatingPointError(f"{why}; {what_now(self.folder, self.args)}"))
        if self.is_main:
            logger.warning(why)

    def save(self, done: int, contents: Callable[[], dict]) -> None:
        """Begin to write the checkpoint after so many steps, on rank 0."""
        if self._saver is not None:
            self._saver.save(done, contents() | {"made_by": self._made_by})

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()
