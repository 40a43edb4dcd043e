"""The experiment trackers: accelerate's, opened so that a missing key or connection never stops or delays a run."""

import logging
import os
from argparse import Namespace
from pathlib import Path
from urllib.parse import urlsplit

from utils.network import PROBE_SECONDS, reachable

logger = logging.getLogger(__name__)


def open_trackers(args: Namespace, folder: Path) -> list:
    """The tracker that `--report-to` names, as a list of none or one; call on rank 0 only."""
    if args.report_to == "none":
        return []
    logging_dir = folder / args.logging_dir
    logging_dir.mkdir(parents=True, exist_ok=True)
    if args.report_to == "tensorboard":
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(args.exp_name, logging_dir=str(logging_dir))
    else:
        from accelerate.tracking import WandBTracker

        reason = _why_offline()
        if reason:
            logger.warning("wandb: %s; it runs offline and writes to %s (later: `wandb sync`)", reason, logging_dir)
        mode = "offline" if reason else None  # None: as WANDB_MODE and wandb's own settings say
        tracker = WandBTracker("REPA-E", name=args.exp_name, dir=str(logging_dir), mode=mode)
    tracker.start()
    config = {
        key: value if isinstance(value, str | int | float | bool) else str(value) for key, value in vars(args).items()
    }
    tracker.store_init_configuration(config)
    return [tracker]


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
