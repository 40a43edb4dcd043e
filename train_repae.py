"""REPA-E: train a latent diffusion transformer together with its VAE (arXiv 2504.10483).

    accelerate launch train_repae.py --exp-name my-run --vae-ckpt pretrained/sdvae/sdvae-f8d4.pt

One step, on images x and labels y (the paper's Algorithm 1): the VAE learns to reconstruct x and to align its latents
with a frozen encoder through a frozen SiT; the discriminator learns to tell x from its reconstruction; SiT learns the
velocity of the latents, detached, and the alignment; SiT's EMA follows.
"""

from configs.arguments import repae_parser
from training.start import require_start

if __name__ == "__main__":  # --help, a mistyped flag and missing files are answered before the heavy imports
    repae_parser().answer_before_imports(check=require_start)

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from dataset.data import ImageData, evenly_spaced
from evaluation.online import online_evaluation
from loss.adversarial import DiscriminatorLoss
from loss.alignment import alignment_loss, normalize_spatially
from loss.config import read_loss_config
from loss.perceptual import load_lpips, lpips_by_shape
from loss.vae import VAELoss
from loss.velocity import direction_loss, velocity_loss
from models.discriminator import PatchDiscriminator, load_discriminator, require_resolution
from models.encoders import Encoder, encoders_by_shape, load_encoders, resize_tokens, resizing_notes
from models.interpolant import Noising, interpolate, time_shift_notes
from models.posterior import TrainableVAE, measure_latent_statistics, sample
from models.sit import SiT, build_sit
from models.sit_files import find_sit_state, load_sit, start_from
from models.vae import latent_shape, latent_statistics, require_trainable, starting_vae, vae_by_shape, vae_config
from models.vae_files import save_latent_stats, vae_of_checkpoint
from models.vae_keys import ldm_parameters, to_ldm
from sampling.generation import preview, preview_sampler, reconstruction_pairs
from sampling.labels import seen_classes
from training.classes import settle_classes
from training.ema import update_ema
from training.health import LatentSpread
from training.optimizer import Optimizer, adamw_settings, checkpoint_entries, restore, set_learning_rates
from training.plan import PlannedRun, flops_for_mfu
from training.run import Run
from utils.counting import shapes_alone
from utils.distributed import launched_rank, main_first
from utils.errors import InputError, about, command
from utils.images import image_grid, to_signed
from utils.modules import frozen, load_strictly
from utils.torch_files import read_torch_file

CHECKPOINT_ENTRIES = ("model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "steps")


@dataclass
class Networks:
    """What a run computes with. A `..._ddp` is the same network, wrapped so that its backward averages gradients."""

    encoders: list[Encoder]  # frozen; each gives targets (B, N, F)
    sit: SiT
    ema: SiT  # the moving average of `sit`, which is what is sampled
    vae: TrainableVAE
    discriminator: PatchDiscriminator
    vae_loss: VAELoss
    discriminator_loss: DiscriminatorLoss  # a module: LeCam's running means are state
    latent_shape: tuple[int, int, int]  # (C, h, w)
    latent_stats: tuple[Tensor, Tensor] | None = None  # scale and bias (1, C, 1, 1) that a fresh normaliser starts from
    sit_ddp: nn.Module = field(init=False)
    vae_ddp: nn.Module = field(init=False)
    discriminator_ddp: nn.Module = field(init=False)


def train_step(
    run: Run,
    nets: Networks,
    optimizers: SimpleNamespace,
    data: Iterator,
    step: int,
    *,
    micro_steps: int,
    noising: Noising,
    proj_coeff: float,
    vae_align_proj_coeff: float,
    ema_decay: float,
    cosine_coeff: float = 0.0,
    spatial_norm: float | None = None,
    stop_grad: bool = True,
    vae_every: int = 1,
) -> dict[str, Tensor]:
    """One optimiser step of VAE, discriminator and SiT, over `micro_steps` batches; returns the scalars to log.

    `optimizers` are called as in checkpoints: `opt` is SiT's, `opt_vae` the VAE's, `opt_disc` the discriminator's.
    """
    logs = {}
    vae_learns = step % vae_every == 0  # at every step, in the paper
    for micro_step in range(micro_steps):
        last = micro_step == micro_steps - 1
        images, labels = next(data)  # uint8 (B, 3, H, W), (B,)
        pixels = to_signed(images)
        with run.autocast():
            targets = [resize_tokens(encoder(images), nets.sit.grid) for encoder in nets.encoders]  # (B, N, F)
        if spatial_norm is not None:
            targets = [normalize_spatially(tokens, spatial_norm) for tokens in targets]
        posterior_eps, noise, t, drop = noising.draw(run.draws(step, micro_step), nets.latent_shape)

        with run.synchronised(nets.vae_ddp, nets.discriminator_ddp, nets.sit_ddp, when=last):
            scalars = {}
            if vae_learns:
                # 1. VAE: reconstruct, and align z through a frozen SiT (running statistics, no label dropped).
                nets.sit.eval()
                with frozen(nets.sit, nets.discriminator):
                    with run.autocast():
                        moments, z, reconstruction = nets.vae_ddp(pixels, posterior_eps)
                    reconstruction = reconstruction.float()
                    vae_loss, terms = nets.vae_loss(pixels, reconstruction, moments, nets.discriminator, step)
                    x_t, velocity_target = interpolate(nets.sit.normalize(z), noise, t, noising.path_type)
                    with run.autocast():
                        if stop_grad:
                            projections = nets.sit.project(x_t, t, labels)
                        else:  # the paper's negative control: the diffusion loss reaches the VAE
                            velocity, projections = nets.sit(x_t, t, labels)
                            vae_loss = vae_loss + velocity_loss(velocity, velocity_target).mean()
                    vae_align_loss = alignment_loss(projections, targets)
                    vae_loss = vae_loss + vae_align_proj_coeff * vae_align_loss
                    optimizers.opt_vae.backward(vae_loss / micro_steps)
                grad_norm_vae = optimizers.opt_vae.step() if last else None

                # 2. Discriminator: real against the same reconstruction, detached; two calls, each its own statistics.
                logits_real = nets.discriminator_ddp(pixels)
                logits_fake = nets.discriminator_ddp(reconstruction.detach())
                d_loss, d_terms = nets.discriminator_loss(logits_real, logits_fake, step)
                optimizers.opt_disc.backward(d_loss / micro_steps)
                grad_norm_disc = optimizers.opt_disc.step() if last else None
                scalars |= dict(vae_loss=vae_loss, vae_align_loss=vae_align_loss, **terms, **d_terms)
            else:
                with torch.no_grad(), run.autocast():
                    z = sample(nets.vae.encode(pixels), posterior_eps)

            # 3. SiT: the same t and noise on detached latents, so that the diffusion loss cannot collapse the VAE.
            nets.sit.train()
            x_t, velocity_target = interpolate(nets.sit.normalize(z.detach()), noise, t, noising.path_type)
            with run.autocast():
                velocity, projections = nets.sit_ddp(x_t, t, labels, drop)
            denoising_loss = velocity_loss(velocity, velocity_target).mean()
            proj_loss = alignment_loss(projections, targets)
            sit_loss = denoising_loss + proj_coeff * proj_loss
            if cosine_coeff > 0:
                scalars["cosine_loss"] = direction_loss(velocity, velocity_target).mean()
                sit_loss = sit_loss + cosine_coeff * scalars["cosine_loss"]
            optimizers.opt.backward(sit_loss / micro_steps)
            grad_norm_sit = optimizers.opt.step() if last else None

        scalars |= dict(sit_loss=sit_loss, denoising_loss=denoising_loss, proj_loss=proj_loss)
        for name, value in scalars.items():
            logs[name] = logs.get(name, 0) + value.detach() / micro_steps

    # 4. EMA of SiT's parameters and of its normaliser.
    update_ema(nets.ema, nets.sit, ema_decay)
    logs["grad_norm_sit"] = grad_norm_sit
    return logs | (dict(grad_norm_vae=grad_norm_vae, grad_norm_disc=grad_norm_disc) if vae_learns else {})


@command
def main(argv: list[str] | None = None) -> None:
    args = repae_parser().parse_args(argv)
    if args.dry_run:
        if launched_rank() == 0:
            print(planned(args).text())
        return
    with Run(args, flops_per_image=flops_for_mfu(planned, args)) as run:
        train(args, run)


def train(args, run: Run) -> None:
    # Read everything, and refuse what cannot work, before anything is written.
    with main_first():
        data = ImageData(args.data_dir, resolution=args.resolution, num_classes=args.num_classes)
        loader = run.batches(data)
        checkpoint = run.read_checkpoint(need=CHECKPOINT_ENTRIES)
        run.notes += settle_classes(args, data, checkpoint)
        nets = build_networks(args, run, checkpoint)
        run.to_device(nets.sit, nets.ema, nets.vae, nets.discriminator, *nets.encoders)
        run.to_device(nets.vae_loss.lpips, nets.discriminator_loss)
        if args.tune_convolutions:
            run.tune_convolutions(nets.vae, nets.discriminator, nets.vae_loss.lpips)
        optimizers = build_optimizers(args, run, nets, checkpoint)
        run.require_room([nets.sit, nets.vae, nets.discriminator], copies=[nets.ema])
    evaluate = online_evaluation(args, run)
    measured = checkpoint is None and start_normalizer(run, nets, data)
    del checkpoint  # frees its tensors

    run.open_folder(from_checkpoint=("vae", "vae_ckpt", "disc_pretrained_ckpt"))
    if measured and run.is_main:
        save_latent_stats(run.folder / "latents-stats.pt", *nets.latent_stats)
    nets.vae_ddp, nets.sit_ddp = run.wrap(nets.vae.train()), run.wrap(nets.sit.train())
    nets.discriminator_ddp = run.wrap(nets.discriminator.train())
    if args.compile:
        compile_networks(nets)
    run.say_how(compiled="SiT's blocks, VAE, encoder's blocks")

    settings = step_settings(args, micro_steps=args.gradient_accumulation_steps)
    spread = LatentSpread(nets.vae)
    steps = run.steps(
        data,
        optimizers=dict(sit=optimizers.opt, vae=optimizers.opt_vae, disc=optimizers.opt_disc),
        checkpoint=partial(checkpoint_contents, args, nets, optimizers),
        evaluate=evaluate and (lambda: evaluate(nets.ema, nets.vae.vae, nets.ema.latent_stats())),
        preview=partial(previews, args, run, nets, data),
    )
    for step in steps:
        rates = set_learning_rates(vars(optimizers).values(), step)
        run.log(step, train_step(run, nets, optimizers, loader, step, **settings) | spread.scalars() | rates)


def step_settings(args, *, micro_steps: int) -> dict:
    """The options that `train_step` takes."""
    return dict(
        micro_steps=micro_steps,
        noising=Noising(args.path_type, args.weighting, args.cfg_prob, args.time_shift),
        proj_coeff=args.proj_coeff,
        vae_align_proj_coeff=args.vae_align_proj_coeff,
        cosine_coeff=args.cosine_coeff,
        spatial_norm=args.spatial_norm,
        ema_decay=args.ema_decay,
        stop_grad=args.stop_grad,
        vae_every=args.vae_every,
    )


def planned(args) -> PlannedRun:
    """The run by shapes alone: no weights are read, and one step of `train_step` is counted."""
    run = PlannedRun(args)
    args = run.args
    config = read_loss_config(args.loss_cfg_path)
    with torch.device("meta"):
        encoders = encoders_by_shape(args.enc_type, args.resolution, args.enc_ckpt)
        vae = vae_by_shape(args.vae, args.vae_ckpt, say=run.notes.append)
        require_trainable(vae)
        vae_loss = VAELoss(config, lpips_by_shape() if config.perceptual_weight > 0 else None)
        nets = assemble(args, run, encoders, vae, PatchDiscriminator(), vae_loss)
    with shapes_alone():
        run.to_device(nets.sit, nets.ema, nets.vae, nets.discriminator, *nets.encoders)
        run.to_device(nets.vae_loss.lpips, nets.discriminator_loss)
        nets.sit_ddp, nets.vae_ddp, nets.discriminator_ddp = nets.sit, nets.vae.train(), nets.discriminator.train()
        optimizers, settings = build_optimizers(args, run, nets, None), step_settings(args, micro_steps=run.micro_steps)
        step = partial(train_step, run, nets, optimizers, repeat(run.images()), **settings)
        contents = partial(checkpoint_contents, args, nets, optimizers, args.max_train_steps)
        networks = dict(sit=nets.sit, vae=nets.vae, lpips=nets.vae_loss.lpips, discriminator=nets.discriminator)
        counted = dict(every=args.vae_every, ema=nets.ema, encoders=nets.encoders, **networks)
        run.count(step, vars(optimizers).values(), contents, **counted)
    return run


def build_networks(args, run: Run, checkpoint: dict | None) -> Networks:
    """All networks on the CPU, from public files or from the checkpoint that the run resumes; nothing is written."""
    torch.manual_seed(args.seed)  # of fresh weights; every other draw has a generator of its own
    encoders = load_encoders(args.enc_type, args.resolution, args.enc_ckpt)
    config = read_loss_config(args.loss_cfg_path)
    vae_loss = VAELoss(config, load_lpips(args.lpips_weights) if config.perceptual_weight > 0 else None)

    if checkpoint is None:
        vae = starting_vae(args.vae, args.vae_ckpt, say=run.notes.append)
        discriminator = load_discriminator(args.disc_pretrained_ckpt)
    else:
        vae, discriminator = vae_of_checkpoint(checkpoint, run.resume_from), load_discriminator(None)
    nets = assemble(args, run, encoders, vae, discriminator, vae_loss)

    if checkpoint is not None:  # its normaliser is further on than the statistics stored with the VAE
        run.notes += load_networks(nets, checkpoint, str(run.resume_from))
        return nets
    nets.latent_stats = latent_statistics(args.vae_ckpt, vae)
    if args.sit_ckpt is not None:
        with about("--sit-ckpt"):
            state, notes = find_sit_state(read_torch_file(args.sit_ckpt), args.sit_ckpt)
            run.notes += notes + start_from(nets.sit, state, args.sit_ckpt)
        nets.ema.load_state_dict(nets.sit.state_dict())
    return nets


def assemble(args, run: Run | PlannedRun, encoders, vae, discriminator, vae_loss) -> Networks:
    """The networks of a run around these, with a fresh SiT."""
    if not encoders:
        raise InputError("--enc-type: REPA-E needs an encoder to align with; train_ldm_only.py runs without one")
    require_resolution(args.resolution)
    shape = latent_shape(vae, args.resolution)
    sit = build_sit(
        args.model,
        shape,
        encoder_depth=args.encoder_depth,
        num_classes=args.num_classes,
        class_dropout_prob=args.cfg_prob,
        z_dims=[encoder.embed_dim for encoder in encoders],
        projector=args.projector,
        qk_norm=args.qk_norm,
        fused_attn=args.fused_attn,
        bn_momentum=args.bn_momentum,
        learn_pos_embed=True,
    )
    run.notes += resizing_notes(encoders, sit.grid) + time_shift_notes(args.time_shift, shape)
    sit.grad_checkpoint, trainable = "sit" in args.grad_checkpoint, TrainableVAE(vae)
    if "vae" in args.grad_checkpoint:
        trainable.checkpoint_activations()
    return Networks(
        encoders=encoders,
        sit=sit,
        ema=copy.deepcopy(sit).eval().requires_grad_(False),
        vae=trainable,
        discriminator=discriminator,
        vae_loss=vae_loss,
        discriminator_loss=DiscriminatorLoss(vae_loss.config),
        latent_shape=shape,
    )


def load_networks(nets: Networks, checkpoint: dict, path: str) -> list[str]:
    """Weights of a checkpoint, ours or public; the VAE's are loaded already. Returns notes for the log."""
    notes = load_sit(nets.sit, checkpoint["model"], f"{path}: model")
    load_sit(nets.ema, checkpoint["ema"], f"{path}: ema")
    load_strictly(nets.discriminator, checkpoint["discriminator"], f"{path}: discriminator")
    if "loss_buffers" in checkpoint:
        load_strictly(nets.discriminator_loss, checkpoint["loss_buffers"], f"{path}: loss_buffers")
    return notes


def start_normalizer(run: Run, nets: Networks, data: ImageData) -> bool:
    """SiT's normaliser starts from the latent statistics stored with the VAE, else from those of the data set; returns
    whether they were measured, because the VAE carries none."""
    measured = nets.latent_stats is None
    if measured:
        run.notes.append("the VAE carries no latent statistics: they were measured on the data set")
        nets.latent_stats = measure_latent_statistics(nets.vae.vae, data, device=run.device)
    for sit in (nets.sit, nets.ema):
        sit.set_latent_stats(*nets.latent_stats)
    return measured


def build_optimizers(args, run: Run, nets: Networks, checkpoint: dict | None) -> SimpleNamespace:
    """Three AdamW, called as in checkpoints, with the moments of the checkpoint that the run resumes."""
    common = adamw_settings(args, scale_loss=run.scales_loss)
    optimizers = SimpleNamespace(
        opt=Optimizer(list(nets.sit.named_parameters()), lr=args.learning_rate, **common),
        opt_vae=Optimizer(ldm_parameters(nets.vae.vae), lr=args.vae_learning_rate, **common),
        opt_disc=Optimizer(list(nets.discriminator.named_parameters()), lr=args.disc_learning_rate, **common),
    )
    if checkpoint is not None:
        other_grid = checkpoint["model"]["pos_embed"].shape != nets.sit.pos_embed.shape
        restore(vars(optimizers), checkpoint, str(run.resume_from), fresh={"pos_embed"} if other_grid else ())
    return optimizers


def compile_networks(nets: Networks) -> None:
    """In place, so that state dicts keep their names."""
    nets.sit.compile_blocks()
    nets.vae.compile_halves()
    for encoder in nets.encoders:
        encoder.compile_blocks()


def checkpoint_contents(args, nets: Networks, optimizers: SimpleNamespace, step: int) -> dict:
    ldm = to_ldm(nets.vae.vae)
    return {
        "model": nets.sit.state_dict(),
        "ema": nets.ema.state_dict(),
        "vae": ldm,
        "discriminator": nets.discriminator.state_dict(),
        **checkpoint_entries(vars(optimizers), {"opt_vae": {name: tensor.shape for name, tensor in ldm.items()}}),
        "args": vars(args),
        "steps": step,
        "vae_config": vae_config(nets.vae.vae),
        "loss_buffers": nets.discriminator_loss.state_dict(),
    }


def previews(args, run: Run, nets: Networks, data: ImageData) -> dict[str, np.ndarray]:
    """Samples of the EMA, and images beside their reconstructions, as two grids; on rank 0."""
    vae, sampler, stats = nets.vae.vae, preview_sampler(nets.ema, args.path_type), nets.ema.latent_stats()
    classes = seen_classes(vars(args), args.num_classes)
    samples = preview(nets.ema, vae, stats, args.num_preview, args.seed, sampler, classes=classes)
    if not run.is_main:
        return {}
    images, _ = data.__getitems__(evenly_spaced(len(data), (args.num_preview + 1) // 2))
    pairs = reconstruction_pairs(vae, images.to(run.device))
    return {"samples": image_grid(samples, columns=8), "reconstructions": image_grid(pairs, columns=8)}


if __name__ == "__main__":
    main()
