"""What a training run refuses before the heavy imports, in the words of what would refuse it later."""

import argparse

from models.vae_names import require_vae
from training.run_folder import starting_point
from utils.errors import about
from utils.inputs import require_inputs


def require_start(args: argparse.Namespace) -> None:
    """Refuse a taken run folder, a missing data folder or VAE within a fraction of a second; a plan (--dry-run) is
    asked nothing.

    Raises:
        InputError: as `starting_point`, `require_data_folder` and `require_vae`, which the run itself asks again.
    """
    if args.dry_run is not None:
        return
    checkpoint = starting_point(args).checkpoint
    require_inputs(args)
    # Of a run that goes on the VAE lies in the checkpoint, where it is not frozen; `none` is a fresh one.
    vae_is_frozen = hasattr(args, "vae_latents_name")
    if args.vae_ckpt is not None and args.vae_ckpt.lower() != "none" and (vae_is_frozen or checkpoint is None):
        with about("--vae-ckpt"):
            require_vae(args.vae_ckpt, args.vae)
