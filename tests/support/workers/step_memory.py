"""Memory of one real step of train_repae.py's networks, without LPIPS: `python step_memory.py RESOLUTION BATCH VAE`.

Prints the bytes by which the process's peak lies above its level before the step.
"""

import contextlib
import itertools
import json
import sys
from types import SimpleNamespace

import torch

import train_repae
from benchmarks.common import forget_peak, peak_gib
from configs.arguments import repae_parser
from loss.config import VAELossConfig
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator
from models.encoders import encoders_by_shape
from models.vae import build_vae
from utils.rng import Draws


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    args = repae_parser().parse_args(argv)
    run = SimpleNamespace(
        device=torch.device("cpu"),
        notes=[],
        scales_loss=False,
        autocast=contextlib.nullcontext,
        synchronised=lambda *modules, when: contextlib.nullcontext(),
        draws=lambda step, micro_step: Draws(0, step, micro_step, args.batch_size, 0, 1, "cpu"),
    )
    encoders = [encoder.to_empty(device="cpu") for encoder in encoders_by_shape(args.enc_type, args.resolution)]
    vae_loss = VAELoss(VAELossConfig(perceptual_weight=0), None)
    nets = train_repae.assemble(args, run, encoders, build_vae(args.vae), PatchDiscriminator(), vae_loss)
    nets.sit_ddp, nets.vae_ddp, nets.discriminator_ddp = nets.sit, nets.vae.train(), nets.discriminator.train()
    optimizers = train_repae.build_optimizers(args, run, nets, None)
    images = torch.zeros(args.batch_size, 3, args.resolution, args.resolution, dtype=torch.uint8)
    batch = images, torch.zeros(args.batch_size, dtype=torch.int64)
    settings = train_repae.step_settings(args, micro_steps=1)
    for step in range(2):  # the first makes Adam's moments
        forget_peak(run.device)
        before = peak_gib(run.device)
        train_repae.train_step(run, nets, optimizers, itertools.repeat(batch), step, **settings)
        after = peak_gib(run.device)
    print(json.dumps((after - before) * 2**30))


if __name__ == "__main__":
    main(sys.argv[1:])
