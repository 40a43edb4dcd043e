"""The experiment trackers: accelerate's, opened so that a missing key or connection never stops or delays a run."""

import logging
import os
import secrets
from argparse import Namespace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from utils.files import atomic_write
from utils.network import PROBE_SECONDS, reachable

logger = logging.getLogger(__name__)

WANDB_RUN = "wandb-run.txt"  # in a run's folder: the id under which wandb knows it


def open_trackers(args: Namespace, folder: Path, *, start_step: int = 0) -> list:
    """The tracker that `--report-to` names, as a list of none or one; call on rank 0 only.

    wandb's project and entity are those of WANDB_PROJECT ("REPA-E" without) and WANDB_ENTITY. A run that goes on in its
    folder goes on in the same run of wandb, whose id is kept there.
    """
    if args.report_to == "none":
        return []
    logging_dir = folder / args.logging_dir
    logging_dir.mkdir(parents=True, exist_ok=True)
    if args.report_to == "tensorboard":
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(args.exp_name, logging_dir=str(logging_dir))
        tracker.log_images = partial(tracker.log_images, dataformats="NHWC")  # as wandb takes them anyway
    else:
        from accelerate.tracking import WandBTracker

        reason = _why_offline()
        if reason:
            logger.warning("wandb: %s; it runs offline and writes to %s (later: `wandb sync`)", reason, logging_dir)
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT") or "REPA-E",
            entity=os.environ.get("WANDB_ENTITY") or None,
            name=args.exp_name,
            id=_wandb_run(folder / WANDB_RUN),
            resume="allow",
            dir=str(logging_dir),
            mode="offline" if reason else None,  # None: as WANDB_MODE and wandb's own settings say
        )
    tracker.start()
    config = {
        key: value if isinstance(value, str | int | float | bool) else str(value) for key, value in vars(args).items()
    }
    tracker.store_init_configuration(config)
    if args.report_to == "wandb" and (first := tracker.tracker.starting_step) > start_step + 1:
        again = f"those after step {start_step}, which are trained again, go to metrics.jsonl alone"
        logger.warning("wandb has rows of this run up to step %d, and keeps them: %s", first - 1, again)
        tracker = _FromStep(tracker, first)
    return [tracker]


class _FromStep:
    """A tracker that gets nothing of the steps before `first`: wandb would refuse each row with a warning."""

    def __init__(self, tracker, first: int):
        self.tracker, self.first, self.finish = tracker, first, tracker.finish

    def log(self, row: dict, step: int) -> None:
        if step >= self.first:
            self.tracker.log(row, step=step)

    def log_images(self, images: dict, step: int) -> None:
        if step >= self.first:
            self.tracker.log_images(images, step=step)


def _wandb_run(file: Path) -> str:
    """The id of this folder's run: as wandb's own WANDB_RUN_ID says, else that of its earlier part, else a new one."""
    known = file.read_text().strip() if file.is_file() else ""
    run = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    with atomic_write(file) as temporary:
        temporary.write_text(run + "\n")
    return run


def _why_offline() -> str | None:
    """Why wandb cannot report online: no connection within ten seconds, or no key. None: it can, or the user chose."""
    if os.environ.get("WANDB_MODE"):
        return None
    import wandb

    server = wandb.setup().settings.base_url
    if not reachable(server):
        return f"{urlsplit(server).hostname} was not reached within {PROBE_SECONDS:.0f} s"
    try:
        return None if wandb.login(prompt=False) else "there is no key (`wandb login`, or WANDB_API_KEY)"
    except wandb.Error as error:
        return " ".join(str(error).split())
