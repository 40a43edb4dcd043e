"""Train a VAE alone, from scratch or from given weights: reconstruction, LPIPS, KL, GAN.

    accelerate launch train_vae.py --exp-name my-vae --vae f8d4 --data-dir data
    accelerate launch train_vae.py --exp-name tuned --vae f8d4 --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt

It is steps 1 and 2 of REPA-E without the alignment, and how data that no public VAE knows get one. At the end the VAE
lies in `<output-dir>/<exp-name>/` as `<exp-name>.pt`, with its latent statistics and discriminator, for --vae-ckpt of
the other scripts.
"""

from configs.arguments import vae_parser
from training.start import require_start

if __name__ == "__main__":  # --help, a mistyped flag and missing files are answered before the heavy imports
    vae_parser().answer_before_imports(check=require_start)

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dataset.data import ImageData, evenly_spaced
from loss.adversarial import DiscriminatorLoss
from loss.config import read_loss_config
from loss.perceptual import load_lpips, lpips_by_shape
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator, load_discriminator, require_resolution
from models.posterior import TrainableVAE, measure_latent_statistics
from models.vae import build_vae, latent_shape, load_vae, require_trainable, vae_by_shape, vae_config
from models.vae_files import require_new_vae_files, save_vae_files, vae_of_checkpoint
from models.vae_keys import ldm_parameters, to_ldm
from sampling.generation import reconstruction_pairs
from training.health import LatentSpread
from training.optimizer import Optimizer, adamw_settings, checkpoint_entries, restore, set_learning_rates
from training.plan import PlannedRun, flops_for_mfu
from training.run import Run
from utils.counting import shapes_alone
from utils.distributed import launched_rank, main_first
from utils.errors import InputError, command
from utils.images import image_grid, to_signed
from utils.modules import frozen, load_strictly

CHECKPOINT_ENTRIES = ("vae", "discriminator", "opt_vae", "opt_disc", "steps")


@dataclass
class Networks:
    """What a run computes with. A `..._ddp` is the same network, wrapped so that its backward averages gradients."""

    vae: TrainableVAE
    discriminator: PatchDiscriminator
    vae_loss: VAELoss
    discriminator_loss: DiscriminatorLoss  # a module: LeCam's running means are state
    latent_shape: tuple[int, int, int]  # (C, h, w)
    vae_ddp: nn.Module = field(init=False)
    discriminator_ddp: nn.Module = field(init=False)


def train_step(
    run: Run, nets: Networks, optimizers: SimpleNamespace, data: Iterator, step: int, *, micro_steps: int
) -> dict[str, Tensor]:
    """One optimiser step of VAE and discriminator over `micro_steps` batches; returns the scalars to log."""
    logs = {}
    for micro_step in range(micro_steps):
        last = micro_step == micro_steps - 1
        images, _ = next(data)
        pixels = to_signed(images)  # [-1, 1] (B, 3, H, W)
        posterior_eps = run.draws(step, micro_step).normal("posterior", *nets.latent_shape)

        with run.synchronised(nets.vae_ddp, nets.discriminator_ddp, when=last):
            # 1. VAE: reconstruct, and convince a frozen discriminator.
            with frozen(nets.discriminator):
                with run.autocast():
                    moments, _, reconstruction = nets.vae_ddp(pixels, posterior_eps)
                reconstruction = reconstruction.float()
                vae_loss, terms = nets.vae_loss(pixels, reconstruction, moments, nets.discriminator, step)
                optimizers.opt_vae.backward(vae_loss / micro_steps)
            grad_norm_vae = optimizers.opt_vae.step() if last else None

            # 2. Discriminator: real against the same reconstruction, detached; two calls, each its own statistics.
            logits_real = nets.discriminator_ddp(pixels)
            logits_fake = nets.discriminator_ddp(reconstruction.detach())
            d_loss, d_terms = nets.discriminator_loss(logits_real, logits_fake, step)
            optimizers.opt_disc.backward(d_loss / micro_steps)
            grad_norm_disc = optimizers.opt_disc.step() if last else None

        for name, value in dict(vae_loss=vae_loss, **terms, **d_terms).items():
            logs[name] = logs.get(name, 0) + value.detach() / micro_steps
    return logs | dict(grad_norm_vae=grad_norm_vae, grad_norm_disc=grad_norm_disc)


@command
def main(argv: list[str] | None = None) -> None:
    args = vae_parser().parse_args(argv)
    if args.dry_run:
        if launched_rank() == 0:
            print(planned(args).text())
        return
    with Run(args, flops_per_image=flops_for_mfu(planned, args)) as run:
        train(args, run)


def train(args, run: Run) -> None:
    # Read everything, and refuse what cannot work, before anything is written.
    with main_first():
        data = ImageData(args.data_dir, resolution=args.resolution)
        loader = run.batches(data)
        checkpoint = run.read_checkpoint(need=CHECKPOINT_ENTRIES)
        nets = build_networks(args, run, checkpoint)
        run.to_device(nets.vae, nets.discriminator, nets.vae_loss.lpips, nets.discriminator_loss)
        if args.tune_convolutions:
            run.tune_convolutions(nets.vae, nets.discriminator, nets.vae_loss.lpips)
        optimizers = build_optimizers(args, run, nets, checkpoint)
        run.require_room([nets.vae, nets.discriminator], copies=[])
        if not (args.overwrite or run.goes_on):
            require_new_vae_files(args.output_dir, args.exp_name, "--exp-name")
    del checkpoint  # frees its tensors

    run.open_folder(from_checkpoint=("vae", "vae_ckpt", "disc_pretrained_ckpt"))
    nets.vae_ddp, nets.discriminator_ddp = run.wrap(nets.vae.train()), run.wrap(nets.discriminator.train())
    if args.compile:
        nets.vae.compile_halves()
    run.say_how(compiled="VAE")

    spread = LatentSpread(nets.vae)
    steps = run.steps(
        data,
        optimizers=dict(vae=optimizers.opt_vae, disc=optimizers.opt_disc),
        checkpoint=partial(checkpoint_contents, args, nets, optimizers),
        preview=partial(previews, args, run, nets, data),
    )
    micro_steps = args.gradient_accumulation_steps
    for step in steps:
        rates = set_learning_rates(vars(optimizers).values(), step)
        scalars = train_step(run, nets, optimizers, loader, step, micro_steps=micro_steps)
        run.log(step, scalars | spread.scalars() | rates)
    write_vae(args, run, nets, data)


def planned(args) -> PlannedRun:
    """The run by shapes alone: no weights are read, and one step of `train_step` is counted."""
    run = PlannedRun(args)
    if not (args.overwrite or run.goes_on):
        require_new_vae_files(args.output_dir, args.exp_name, "--exp-name")
    config = read_loss_config(args.loss_cfg_path)
    with torch.device("meta"):
        vae = vae_by_shape(args.vae, args.vae_ckpt, say=run.notes.append)
        vae_loss = VAELoss(config, lpips_by_shape() if config.perceptual_weight > 0 else None)
        nets = assemble(args, vae, PatchDiscriminator(), vae_loss)
    with shapes_alone():
        run.to_device(nets.vae, nets.discriminator, nets.vae_loss.lpips, nets.discriminator_loss)
        nets.vae_ddp, nets.discriminator_ddp = nets.vae.train(), nets.discriminator.train()
        optimizers, settings = build_optimizers(args, run, nets, None), dict(micro_steps=run.micro_steps)
        step = partial(train_step, run, nets, optimizers, repeat(run.images()), **settings)
        contents = partial(checkpoint_contents, args, nets, optimizers, args.max_train_steps)
        networks = dict(vae=nets.vae, lpips=nets.vae_loss.lpips, discriminator=nets.discriminator)
        run.count(step, vars(optimizers).values(), contents, **networks)
    return run


def build_networks(args, run: Run, checkpoint: dict | None) -> Networks:
    """All networks on the CPU: fresh, from given files, or from the checkpoint that the run resumes."""
    torch.manual_seed(args.seed)  # of fresh weights; every other draw has a generator of its own
    config = read_loss_config(args.loss_cfg_path)
    vae_loss = VAELoss(config, load_lpips(args.lpips_weights) if config.perceptual_weight > 0 else None)

    if checkpoint is not None:
        path = str(run.resume_from)
        nets = assemble(args, vae_of_checkpoint(checkpoint, path), load_discriminator(None), vae_loss)
        load_strictly(nets.discriminator, checkpoint["discriminator"], f"{path}: discriminator")
        load_strictly(nets.discriminator_loss, checkpoint["loss_buffers"], f"{path}: loss_buffers")
        return nets
    if args.vae_ckpt is None and args.vae == "auto":
        raise InputError("--vae auto takes the architecture from --vae-ckpt; from scratch, name one")
    vae = load_vae(args.vae, args.vae_ckpt, say=run.notes.append) if args.vae_ckpt else build_vae(args.vae)
    return assemble(args, vae, load_discriminator(args.disc_pretrained_ckpt), vae_loss)


def assemble(args, vae: AutoencoderKL, discriminator: PatchDiscriminator, vae_loss: VAELoss) -> Networks:
    """The networks of a run around these."""
    require_trainable(vae)
    require_resolution(args.resolution)
    trainable = TrainableVAE(vae)
    if "vae" in args.grad_checkpoint:
        trainable.checkpoint_activations()
    losses = vae_loss, DiscriminatorLoss(vae_loss.config)
    return Networks(trainable, discriminator, *losses, latent_shape(vae, args.resolution))


def build_optimizers(args, run: Run, nets: Networks, checkpoint: dict | None) -> SimpleNamespace:
    """Two AdamW, called as in checkpoints, with the moments of the checkpoint that the run resumes."""
    common = adamw_settings(args, scale_loss=run.scales_loss)
    optimizers = SimpleNamespace(
        opt_vae=Optimizer(ldm_parameters(nets.vae.vae), lr=args.vae_learning_rate, **common),
        opt_disc=Optimizer(list(nets.discriminator.named_parameters()), lr=args.disc_learning_rate, **common),
    )
    if checkpoint is not None:
        restore(vars(optimizers), checkpoint, str(run.resume_from))
    return optimizers


def checkpoint_contents(args, nets: Networks, optimizers: SimpleNamespace, step: int) -> dict:
    ldm = to_ldm(nets.vae.vae)
    return {
        "vae": ldm,
        "discriminator": nets.discriminator.state_dict(),
        **checkpoint_entries(vars(optimizers), {"opt_vae": {name: tensor.shape for name, tensor in ldm.items()}}),
        "args": vars(args),
        "steps": step,
        "vae_config": vae_config(nets.vae.vae),
        "loss_buffers": nets.discriminator_loss.state_dict(),
    }


def previews(args, run: Run, nets: Networks, data: ImageData) -> dict[str, np.ndarray]:
    """Images beside their reconstructions as a grid; on rank 0."""
    if not run.is_main:
        return {}
    images, _ = data.__getitems__(evenly_spaced(len(data), (args.num_preview + 1) // 2))
    pairs = reconstruction_pairs(nets.vae.vae, images.to(run.device))
    return {"reconstructions": image_grid(pairs, columns=8)}


def write_vae(args, run: Run, nets: Networks, data: ImageData) -> None:
    """The VAE's files, with the statistics of its latents on this data set."""
    vae, discriminator = nets.vae.vae.eval(), nets.discriminator.state_dict()
    stats = measure_latent_statistics(vae, data, device=run.device)
    if run.is_main:
        folder = save_vae_files(args.output_dir, args.exp_name, vae, *stats, discriminator, overwrite=True)
        print(f"the VAE is {Path(folder) / args.exp_name}.pt")


if __name__ == "__main__":
    main()
