"""The weaker SiT of autoguidance (Karras et al. 2024, arXiv 2406.02507), beside the run whose samples it guides."""

import argparse

from dataset.latents import difference
from models.vae_files import weights_sha256
from sampling.trained import TrainedRun, load_trained
from utils.errors import InputError, renamed

FLAGS = {"--exp-path": "--guide-exp-path", "--train-steps": "--guide-train-steps"}


def load_guide(args: argparse.Namespace, trained: TrainedRun) -> TrainedRun | None:
    """What --guide-exp-path and --guide-train-steps name, by shapes alone where the run is; None without them.

    --vae-ckpt, where it is given, counts for both.

    Raises:
        InputError: no such run or checkpoint; another VAE, latents, classes or path than the run's.
    """
    if args.guide_exp_path is None:
        return None
    with renamed(FLAGS):
        by_shape = trained.sit.pos_embed.is_meta
        named = args.guide_exp_path, args.guide_train_steps, args.vae_ckpt
        guide = load_trained(*named, ema=args.ema, by_shape=by_shape)
    who = f"--guide-exp-path: {guide.checkpoint}"
    if weights_sha256(guide.vae) != weights_sha256(trained.vae):
        raise InputError(f"{who} has another VAE than {trained.checkpoint}, and so other latents")
    path = args.path_type
    for what, own, needed in (
        ("latents", guide.latent_shape, trained.latent_shape),
        ("classes", guide.sit.num_classes, trained.sit.num_classes),
        ("path type", guide.args.get("path_type", path), trained.args.get("path_type", path)),
    ):
        if own != needed:
            raise InputError(f"{who} has {what} {own}; {trained.checkpoint} needs {needed}")
    if apart := difference(trained.latent_stats, guide.latent_stats):
        raise InputError(f"{who} has learnt latents of another normalisation, which differs {apart}")
    return guide
