"""Joint training with random weights and random images: networks of any size without a file."""

import gc
import math
import time
from pathlib import Path

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
from tests.support.small import argv
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


def train(folder: Path, *, steps: int, warm: int, **options) -> tuple[dict, float]:
    """A row of the rates, and the share of steps after the first with a loss that is not finite.

    Args:
        steps, warm: all of them, and how many of these come before the clock starts.
    """
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    usual = dict(output_dir=folder, exp_name="run", num_classes=1000, report_to="none", num_workers=0)
    args = repae_parser().parse_args(argv(**usual | options))
    run = Run(args)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak(run.device)
    nets, optimizers = prepare(args, run)
    loader, settings = run.batches(RandomImages(args.resolution)), train_repae.step_settings(args, micro_steps=1)
    losses, began = [], time.perf_counter()
    for step in range(steps):
        logs = train_repae.train_step(run, nets, optimizers, loader, step, **settings)
        losses.append(torch.stack([logs["vae_loss"], logs["d_loss"], logs["sit_loss"]]))
        if step == 0:
            synchronize(run.device)
            first = time.perf_counter() - began
        if step + 1 == warm:
            synchronize(run.device)
            began = time.perf_counter()
    synchronize(run.device)
    rate = (steps - warm) * args.batch_size / (time.perf_counter() - began)
    row = dict(model=args.model, vae=args.vae, precision=args.mixed_precision, compiled=args.compile)
    row |= dict(images=args.batch_size, steps=steps, images_per_second=rate)
    row |= dict(peak_gib=peak_gib(run.device), first_step_s=first)
    infinite = (~torch.stack(losses).isfinite()).any(dim=1).float().mean().item()
    assert math.isfinite(rate)
    return row, infinite
