"""Joint training with random weights and random images: networks of any size without a file.

    python -m tests.gpu.full_size '{"output_dir": "/tmp/runs", "steps": 50, "warm": 5, "seconds": 60, "vae": "f8d4"}'

prints the row of the rates, and the share of steps whose losses are not finite, as JSON. A process of its own keeps a
fault, and memory that others hold, from the next case.
"""

import json
import sys
import time

import torch
from torch import Tensor

import train_repae
from benchmarks.common import synchronize
from benchmarks.train_step import with_random_weights
from configs.arguments import repae_parser
from loss.config import read_loss_config
from loss.perceptual import lpips_by_shape
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator
from models.encoders import encoders_by_shape
from models.vae import build_vae
from tests.support import small
from training.run import Run
from utils.memory import forget_peak, peak_gib


class RandomImages:
    """A data set of 64 random images that repeat."""

    def __init__(self, resolution: int):
        self.images = torch.randint(256, (64, 3, resolution, resolution), dtype=torch.uint8)

    def __len__(self) -> int:
        return 2048

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        indices = torch.tensor(indices)
        return self.images[indices % len(self.images)], indices % 1000


def prepare(args, run: Run) -> tuple[train_repae.Networks, object]:
    """Networks and optimisers as `train_repae.main` makes them, on the run's device."""
    with torch.device("meta"):
        encoders = encoders_by_shape(args.enc_type, args.resolution)
    encoders = [with_random_weights(encoder) for encoder in encoders]
    loss = VAELoss(read_loss_config(args.loss_cfg_path), with_random_weights(lpips_by_shape()))
    nets = train_repae.assemble(args, run, encoders, build_vae(args.vae), PatchDiscriminator(), loss)
    run.to_device(nets.sit, nets.ema, nets.vae, nets.discriminator, *nets.encoders)
    run.to_device(nets.vae_loss.lpips, nets.discriminator_loss)
    optimizers = train_repae.build_optimizers(args, run, nets, None)
    nets.vae_ddp, nets.sit_ddp = run.wrap(nets.vae.train()), run.wrap(nets.sit.train())
    nets.discriminator_ddp = run.wrap(nets.discriminator.train())
    if args.compile:
        train_repae.compile_networks(nets)
    return nets, optimizers


def train(*, steps: int, warm: int, seconds: float, **options) -> tuple[dict, float]:
    """A row of the rates, and the share of steps with a loss that is not finite.

    Args:
        steps, seconds: it ends with whichever comes first; the clock starts after `warm` of the steps.
        options: of train_repae.py.
    """
    torch.manual_seed(0)
    usual = dict(exp_name="run", num_classes=1000, report_to="none", num_workers=0)
    args = repae_parser().parse_args(small.argv(**usual | options))
    run = Run(args)
    forget_peak(run.device)
    nets, optimizers = prepare(args, run)
    loader, settings = run.batches(RandomImages(args.resolution)), train_repae.step_settings(args, micro_steps=1)
    losses, began = [], time.perf_counter()
    while len(losses) < steps and (len(losses) <= warm or time.perf_counter() - began < seconds):
        logs = train_repae.train_step(run, nets, optimizers, loader, len(losses), **settings)
        losses.append(torch.stack([logs["vae_loss"], logs["d_loss"], logs["sit_loss"]]))
        if len(losses) == 1:
            synchronize(run.device)
            first = time.perf_counter() - began
        if len(losses) == warm:
            synchronize(run.device)
            began = time.perf_counter()
    synchronize(run.device)
    rate = (len(losses) - warm) * args.batch_size / (time.perf_counter() - began)
    row = dict(model=args.model, vae=args.vae, precision=args.mixed_precision, compiled=args.compile)
    row |= dict(grad_checkpoint=",".join(args.grad_checkpoint), images=args.batch_size, steps=len(losses))
    row |= dict(images_per_second=rate, peak_gib=peak_gib(run.device), first_step_s=first)
    return row, (~torch.stack(losses).isfinite()).any(dim=1).float().mean().item()


def train_apart(**case) -> tuple[dict, float]:
    """`train` in a process of its own; its error is the test's."""
    done = small.run_python("-m", "tests.gpu.full_size", json.dumps(case, default=str), timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(train(**json.loads(sys.argv[1]))))
