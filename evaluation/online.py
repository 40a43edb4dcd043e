"""Evaluation in the middle of training: the moving average's samples against a reference, on all processes."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from evaluation.evaluator import NEIGHBOUR, Evaluator
from evaluation.features import load_features
from evaluation.reference import read_reference
from models.sit import SiT
from sampling.generation import SamplerConfig, draw_images
from utils.distributed import main_first, rank, world_size
from utils.errors import InputError, about, renamed
from utils.rng import sample_labels

# evaluate.py's names of the flags, which errors use, and those of the training scripts.
FLAGS = {"--features": "--eval-features", "--inception-weights": "--eval-weights", "--enc-ckpt": "--eval-weights"}


def online_evaluation(args, run) -> "OnlineEvaluation | None":
    """What --eval-steps and its companions ask for; None where --eval-steps is 0."""
    with main_first():
        if args.eval_steps == 0:
            if args.eval_reference is not None:
                raise InputError(f"--eval-reference: {args.eval_reference} was given; it goes with --eval-steps")
            return None
        if args.eval_reference is None:
            raise InputError(
                "--eval-reference: an ADM reference file, a --save-stats file or images are needed by --eval-steps"
            )
        if args.eval_samples <= NEIGHBOUR:
            raise InputError(f"--eval-samples: {args.eval_samples} was given; more than {NEIGHBOUR} are needed")
    with renamed(FLAGS):
        return OnlineEvaluation(
            args.eval_reference,
            features=args.eval_features,
            weights=args.eval_weights,
            count=args.eval_samples,
            resolution=args.resolution,
            seed=args.seed,
            path_type=args.path_type,
            device=run.device,
        )


class OnlineEvaluation:
    """Draws the same samples at every call, without guidance, 50 Euler steps, and measures them.

    The training's random draws are not touched: every draw here depends on (seed, sample number) alone.

    Args:
        reference: as `evaluate.py --reference` takes it.
        features: as `--features` there.
        weights: of the feature network, when not downloaded.
        count: samples.
        resolution: side of the images.
        seed: of the samples.
        path_type: as the model is trained.
        batch_size: samples at a time per process.
    """

    def __init__(
        self,
        reference: str,
        *,
        features: str,
        weights: str | None,
        count: int,
        resolution: int,
        seed: int,
        path_type: str,
        device: torch.device,
        batch_size: int = 64,
    ):
        size = (resolution, resolution)
        self.device, self.count, self.seed, self.batch_size = device, count, seed, batch_size
        self.sampler = SamplerConfig(path_type=path_type)
        with main_first():
            self.network = load_features(features, size, weights=weights).to(device)
        with about("--eval-reference"):
            self.reference = read_reference(reference, self.network, size, device)

    @torch.no_grad()
    def __call__(self, sit: SiT, vae: AutoencoderKL, latent_stats: tuple[Tensor, Tensor]) -> dict[str, float]:
        """The metrics of `evaluate.py`, the same on every process; all processes must call."""
        evaluator = Evaluator(self.network, self.reference, self.device)
        for start in range(rank() * self.batch_size, self.count, world_size() * self.batch_size):
            indices = range(start, start + self.batch_size)  # the last batch keeps its shape; what is over is dropped
            labels = sample_labels(self.seed, indices, sit.num_classes).to(self.device)
            images = draw_images(sit, vae, latent_stats, indices, labels, self.seed, self.sampler)
            kept = min(self.batch_size, self.count - start)
            evaluator.add(images[:kept], torch.tensor(indices[:kept]))
        return evaluator.result()
