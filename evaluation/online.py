"""Evaluation in the middle of training: samples of SiT's EMA against a reference, on all processes."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from configs.arguments import repae_parser
from configs.parsing import flag_of
from evaluation.evaluator import NEIGHBOUR, Evaluator, FeatureSet
from evaluation.features import load_features
from evaluation.reference import read_reference
from models.sit import SiT
from sampling.generation import SamplerConfig, draw_images
from sampling.labels import LabelScheme, seen_classes
from utils.distributed import main_first, rank, world_size
from utils.errors import InputError, about, renamed

# evaluate.py's names of the flags, which errors use, and those of the training scripts.
FLAGS = {"--features": "--eval-features", "--inception-weights": "--eval-weights", "--enc-ckpt": "--eval-weights"}
BATCH_SIZE = 64  # samples at a time per process


def online_evaluation(args, run) -> "OnlineEvaluation | None":
    """What --eval-steps and its companions ask for; None where --eval-steps is 0.

    Raises:
        InputError: flags that do not go together; a reference or feature network that is absent or does not fit.
    """
    with main_first():
        if args.eval_steps == 0:
            default = repae_parser().get_default
            for name in ("eval_reference", "eval_features", "eval_weights", "eval_samples"):
                if (given := getattr(args, name)) != default(name):
                    raise InputError(f"{flag_of(name)}: {given} was given; it goes with --eval-steps")
            return None
        if args.eval_reference is None:
            needed = "an ADM reference file, a --save-stats file or images"
            raise InputError(f"--eval-reference: {needed} are needed by --eval-steps")
        if args.eval_samples <= NEIGHBOUR:
            raise InputError(f"--eval-samples: {args.eval_samples} was given; more than {NEIGHBOUR} are needed")

    size = (args.resolution, args.resolution)
    with renamed(FLAGS):
        with main_first():
            network = load_features(args.eval_features, size, weights=args.eval_weights).to(run.device)
        with about("--eval-reference"):
            reference = read_reference(args.eval_reference, network, size, run.device)
    run.notes += reference.notes  # for the log, which is not open yet
    sampler = SamplerConfig(path_type=args.path_type)  # its defaults: 50 Euler steps, no guidance
    # As generate.py draws them: from the classes that the run sees.
    labels = LabelScheme("random", seen_classes(vars(args), args.num_classes), args.seed)
    return OnlineEvaluation(network, reference, sampler, args.eval_samples, labels)


class OnlineEvaluation:
    """Draws the same samples at every call and measures them against the reference.

    The training's random draws are not touched: every draw here depends on (seed, sample number) alone.

    Args:
        network: as `load_features` gives it, on the device of the networks that are measured.
        reference: in the space of that network.
        sampler: how samples are drawn.
        count: samples.
        labels: the label of every sample; its seed is that of the samples' noise, too.
    """

    def __init__(
        self, network: nn.Module, reference: FeatureSet, sampler: SamplerConfig, count: int, labels: LabelScheme
    ):
        self.network, self.reference, self.sampler = network, reference, sampler
        self.count, self.labels = count, labels

    @torch.no_grad()
    def __call__(self, sit: SiT, vae: AutoencoderKL, latent_stats: tuple[Tensor, Tensor]) -> dict[str, float]:
        """The metrics of `evaluate.py`, the same on every process; all processes must call."""
        device = sit.pos_embed.device
        evaluator = Evaluator(self.network, self.reference, device)
        for start in range(rank() * BATCH_SIZE, self.count, world_size() * BATCH_SIZE):
            indices = range(start, start + BATCH_SIZE)  # the last batch keeps its shape; what is over is dropped
            labels = self.labels(indices).to(device)
            images = draw_images(sit, vae, latent_stats, indices, labels, self.labels.seed, self.sampler)
            kept = min(BATCH_SIZE, self.count - start)
            evaluator.add(images[:kept], torch.tensor(indices[:kept]))
        return evaluator.result()
