"""Train SiT on the cached latents of a frozen VAE (such as an E2E-VAE), with or without representation alignment.

    accelerate launch train_ldm_only.py --exp-name my-ldm --vae-ckpt exps/e2e-vae/e2e-vae.pt --vae-latents-name e2e-vae

`--enc-type None --proj-coeff 0` is plain SiT: no encoder is loaded and no image is read.
"""

from configs.arguments import ldm_only_parser
from configs.parsing import flag_of
from training.start import require_start

if __name__ == "__main__":  # --help, a mistyped flag and missing files are answered before the heavy imports
    ldm_only_parser().answer_before_imports(check=require_start)

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dataset.data import ImageData, LatentData, LatentsAndLabels
from dataset.latents import difference, sample_mean_std
from evaluation.online import online_evaluation
from loss.alignment import alignment_loss, normalize_spatially
from loss.velocity import direction_loss, velocity_loss
from models.encoders import Encoder, encoders_by_shape, load_encoders, resize_tokens, resizing_notes
from models.interpolant import Noising, interpolate, time_shift_notes
from models.sit import SiT, build_sit
from models.sit_files import load_sit
from models.vae import latent_channels, latent_statistics, load_vae, vae_by_shape
from models.vae_files import vae_sha256
from sampling.generation import preview, preview_sampler
from sampling.labels import seen_classes
from training.classes import settle_classes
from training.ema import update_ema
from training.optimizer import Optimizer, adamw_settings, checkpoint_entries, restore, set_learning_rates
from training.plan import PlannedRun, flops_for_mfu
from training.run import Run
from utils.counting import shapes_alone
from utils.distributed import launched_rank, main_first
from utils.errors import InputError, command
from utils.images import image_grid

CHECKPOINT_ENTRIES = ("model", "ema", "opt", "steps")


@dataclass
class Networks:
    """What a run computes with."""

    encoders: list[Encoder]  # frozen; each gives targets (B, N, F); none for plain SiT
    sit: SiT
    ema: SiT  # the moving average of `sit`, which is what is sampled
    vae: AutoencoderKL  # frozen; decodes previews and evaluations
    latent_shape: tuple[int, int, int]  # (C, h, w)
    sit_ddp: nn.Module = field(init=False)  # `sit`, wrapped so that its backward averages gradients


def train_step(
    run: Run,
    nets: Networks,
    optimizer: Optimizer,
    data: Iterator,
    step: int,
    *,
    micro_steps: int,
    noising: Noising,
    proj_coeff: float,
    ema_decay: float,
    cosine_coeff: float = 0.0,
    spatial_norm: float | None = None,
    proj_until: float = math.inf,
) -> dict[str, Tensor]:
    """One optimiser step of SiT over `micro_steps` batches; returns the scalars to log."""
    logs = {}
    encoders = nets.encoders if step < proj_until else []
    for micro_step in range(micro_steps):
        # mean_std (B, 2C, h, w); images uint8 (B, 3, H, W) if there is an encoder to look at them; labels (B,)
        mean_std, *images, labels = next(data)
        with run.autocast():
            targets = [resize_tokens(encoder(*images), nets.sit.grid) for encoder in encoders]  # (B, N, F)
        if spatial_norm is not None:
            targets = [normalize_spatially(tokens, spatial_norm) for tokens in targets]
        posterior_eps, noise, t, drop = noising.draw(run.draws(step, micro_step), nets.latent_shape)

        # SiT, as in step 3 of REPA-E, on cached latents.
        nets.sit.train()
        nets.sit.bn.eval()  # the VAE is frozen, and so is the normaliser of its latents
        x_0 = nets.sit.normalize(sample_mean_std(mean_std, posterior_eps))
        x_t, velocity_target = interpolate(x_0, noise, t, noising.path_type)
        with run.synchronised(nets.sit_ddp, when=micro_step == micro_steps - 1):
            with run.autocast():
                velocity, projections = nets.sit_ddp(x_t, t, labels, drop)
            denoising_loss = velocity_loss(velocity, velocity_target).mean()
            proj_loss = alignment_loss(projections, targets) if targets else no_alignment(nets.sit)
            sit_loss, scalars = denoising_loss + proj_coeff * proj_loss, {}
            if cosine_coeff > 0:
                scalars["cosine_loss"] = direction_loss(velocity, velocity_target).mean()
                sit_loss = sit_loss + cosine_coeff * scalars["cosine_loss"]
            optimizer.backward(sit_loss / micro_steps)

        scalars |= dict(sit_loss=sit_loss, denoising_loss=denoising_loss, proj_loss=proj_loss)
        for name, value in scalars.items():
            logs[name] = logs.get(name, 0) + value.detach() / micro_steps
    logs["grad_norm_sit"] = optimizer.step()

    # EMA of SiT's parameters.
    update_ema(nets.ema, nets.sit, ema_decay)
    return logs


def no_alignment(sit: SiT) -> Tensor:
    """A loss of 0 of which projectors, where there are some, are a part: otherwise their gradients would be waited for
    when processes average theirs."""
    projectors = (0 * parameter.sum() for parameter in sit.projectors.parameters())
    return sum(projectors, sit.pos_embed.new_zeros(()))


@command
def main(argv: list[str] | None = None) -> None:
    args = ldm_only_parser().parse_args(argv)
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
        latents = LatentData(Path(args.data_dir) / args.vae_latents_name, data)
        checkpoint = run.read_checkpoint(need=CHECKPOINT_ENTRIES)
        run.notes += settle_classes(args, data, checkpoint)
        nets = build_networks(args, run, latents, checkpoint)
        loader = run.batches(LatentsAndLabels(latents, data, with_images=bool(nets.encoders)))
        run.to_device(nets.sit, nets.ema, nets.vae, *nets.encoders)
        optimizer = build_optimizer(args, run, nets, checkpoint)
        run.require_room([nets.sit], copies=[nets.ema])
    del checkpoint  # frees its tensors
    evaluate = online_evaluation(args, run)

    run.open_folder()
    nets.sit_ddp = run.wrap(nets.sit.train())
    if args.compile:
        compile_networks(nets)
    run.say_how(compiled="SiT's blocks, encoder's blocks")

    settings = step_settings(args, micro_steps=args.gradient_accumulation_steps)
    steps = run.steps(
        data,
        optimizers=dict(sit=optimizer),
        checkpoint=partial(checkpoint_contents, args, nets, optimizer),
        evaluate=evaluate and (lambda: evaluate(nets.ema, nets.vae, nets.sit.latent_stats())),
        preview=partial(previews, args, run, nets),
    )
    for step in steps:
        rates = set_learning_rates([optimizer], step)
        run.log(step, train_step(run, nets, optimizer, loader, step, **settings) | rates)


def step_settings(args, *, micro_steps: int) -> dict:
    """The options that `train_step` takes."""
    return dict(
        micro_steps=micro_steps,
        noising=Noising(args.path_type, args.weighting, args.cfg_prob, args.time_shift),
        proj_coeff=args.proj_coeff,
        cosine_coeff=args.cosine_coeff,
        spatial_norm=args.spatial_norm,
        proj_until=math.inf if args.proj_until is None else args.proj_until,
        ema_decay=args.ema_decay,
    )


def planned(args) -> PlannedRun:
    """The run by shapes alone: no weights are read, and one step of `train_step` is counted."""
    run = PlannedRun(args)
    args = run.args
    with torch.device("meta"):
        encoders = encoders_by_shape(args.enc_type, args.resolution, args.enc_ckpt)
        vae = vae_by_shape(args.vae, args.vae_ckpt, say=run.notes.append).requires_grad_(False)
        nets = assemble(args, run, encoders, vae, run.latents(vae))
    with shapes_alone():
        run.to_device(nets.sit, nets.ema, nets.vae, *nets.encoders)
        nets.sit_ddp, (channels, *sides) = nets.sit, nets.latent_shape
        optimizer, settings = build_optimizer(args, run, nets, None), step_settings(args, micro_steps=run.micro_steps)
        if args.proj_until is not None:
            run.notes.append(f"--proj-until {args.proj_until}: every step is counted as one with alignment")
            settings["proj_until"] = math.inf
        images, labels = run.images()
        batch = torch.empty(run.share, 2 * channels, *sides), *([images] if encoders else []), labels
        step = partial(train_step, run, nets, optimizer, repeat(batch), **settings)
        contents = partial(checkpoint_contents, args, nets, optimizer, args.max_train_steps)
        run.count(step, [optimizer], contents, ema=nets.ema, encoders=encoders, sit=nets.sit, beside={"VAE": nets.vae})
    return run


def build_networks(args, run: Run, latents: LatentData, checkpoint: dict | None) -> Networks:
    """All networks on the CPU; weights of SiT from the checkpoint that the run resumes, if it does."""
    torch.manual_seed(args.seed)  # of fresh weights; every other draw has a generator of its own
    encoders = load_encoders(args.enc_type, args.resolution, args.enc_ckpt)

    # The VAE only decodes, for previews and evaluations; its latents are cached, and must be this VAE's.
    vae = load_vae(args.vae, args.vae_ckpt, say=run.notes.append).requires_grad_(False)
    channels, *sides = latents.array.shape[1:]
    shape = (channels // 2, *sides)
    if latent_channels(vae) != shape[0]:
        cached = f"{latents.path}.npy holds latents of {shape[0]} channels"
        raise InputError(f"--vae-latents-name: {cached}; the VAE of --vae-ckpt has {latent_channels(vae)}")
    require_same_vae(args.vae_ckpt, vae, latents)

    nets = assemble(args, run, encoders, vae, shape)
    stored = latent_statistics(args.vae_ckpt, vae) or cached_statistics(latents)
    nets.sit.set_latent_stats(*stored)
    nets.ema.set_latent_stats(*stored)
    if checkpoint is not None:
        run.notes += load_sit(nets.sit, checkpoint["model"], f"{run.resume_from}: model")
        load_sit(nets.ema, checkpoint["ema"], f"{run.resume_from}: ema")
        # SiT has learnt the latents of the checkpoint's normaliser: it stays, and sampling undoes it.
        if apart := difference(nets.sit.latent_stats(), stored):
            run.notes.append(f"the latent statistics of {run.resume_from} count; the VAE's own differ {apart}")
    return nets


def assemble(args, run: Run | PlannedRun, encoders, vae, latent_shape: tuple[int, int, int]) -> Networks:
    """The networks of a run around these, with a fresh SiT."""
    if not encoders and args.proj_coeff > 0:
        raise InputError(f"--enc-type None was given; --proj-coeff 0 goes with it, not {args.proj_coeff}")
    usual = {"proj_until": None, "spatial_norm": None, "projector": "mlp"}
    for name, default in usual.items():
        flag, value = flag_of(name), getattr(args, name)
        if not encoders and value != default:
            raise InputError(f"{flag}: {value} was given; it goes with an encoder, and --enc-type is None")
    sit = build_sit(
        args.model,
        latent_shape,
        encoder_depth=args.encoder_depth,
        num_classes=args.num_classes,
        class_dropout_prob=args.cfg_prob,
        z_dims=[encoder.embed_dim for encoder in encoders],
        projector=args.projector,
        qk_norm=args.qk_norm,
        fused_attn=args.fused_attn,
    )
    sit.grad_checkpoint = "sit" in args.grad_checkpoint
    run.notes += resizing_notes(encoders, sit.grid) + time_shift_notes(args.time_shift, latent_shape)
    ema = copy.deepcopy(sit).eval().requires_grad_(False)
    return Networks(encoders=encoders, sit=sit, ema=ema, vae=vae, latent_shape=latent_shape)


def require_same_vae(vae_ckpt: str, vae: AutoencoderKL, latents: LatentData) -> None:
    """Refuse latents of one VAE beside the decoder of another."""
    cached = latents.info.get("vae_sha256")
    if cached and vae_sha256(vae_ckpt, vae) != cached:
        other = f"is not the VAE that {latents.path}.npy was cached with ({latents.info.get('vae')})"
        raise InputError(f"--vae-ckpt: {vae_ckpt} {other}; its samples would be decoded wrongly")


def cached_statistics(latents: LatentData) -> tuple[Tensor, Tensor]:
    """Scale and bias (1, C, 1, 1) that cache_latents.py stored beside the latents."""
    scale, bias = (torch.tensor(latents.info[f"latents_{key}"]).view(1, -1, 1, 1) for key in ("scale", "bias"))
    return scale, bias


def build_optimizer(args, run: Run, nets: Networks, checkpoint: dict | None) -> Optimizer:
    """AdamW, with the moments of the checkpoint that the run resumes."""
    parameters = list(nets.sit.named_parameters())
    optimizer = Optimizer(parameters, lr=args.learning_rate, **adamw_settings(args, scale_loss=run.scales_loss))
    if checkpoint is not None:
        restore({"opt": optimizer}, checkpoint, str(run.resume_from))
    return optimizer


def compile_networks(nets: Networks) -> None:
    """In place, so that state dicts keep their names."""
    nets.sit.compile_blocks()
    for encoder in nets.encoders:
        encoder.compile_blocks()


def checkpoint_contents(args, nets: Networks, optimizer: Optimizer, step: int) -> dict:
    return {
        "model": nets.sit.state_dict(),
        "ema": nets.ema.state_dict(),
        **checkpoint_entries({"opt": optimizer}, {}),
        "args": vars(args),
        "steps": step,
    }


def previews(args, run: Run, nets: Networks) -> dict[str, np.ndarray]:
    """Samples of the EMA as a grid."""
    sampler, stats = preview_sampler(nets.ema, args.path_type), nets.sit.latent_stats()
    classes = seen_classes(vars(args), args.num_classes)
    samples = preview(nets.ema, nets.vae, stats, args.num_preview, args.seed, sampler, classes=classes)
    return {"samples": image_grid(samples, columns=8)}


if __name__ == "__main__":
    main()
