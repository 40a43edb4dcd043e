"""Train SiT on the cached latents of a frozen VAE (such as an E2E-VAE), with or without representation alignment.

    accelerate launch train_ldm_only.py --exp-name my-ldm --vae-ckpt exps/e2e-vae/e2e-vae.pt --vae-latents-name e2e-vae

`--enc-type None --proj-coeff 0` is plain SiT: no encoder is loaded and no image is read.
"""

from configs.arguments import ldm_only_parser

if __name__ == "__main__":  # --help and a mistyped flag answer before the heavy imports
    ldm_only_parser().parse_args()

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dataset.data import ImageData, LatentData, LatentsAndLabels
from dataset.latents import sample_mean_std
from evaluation.online import online_evaluation
from loss.alignment import alignment_loss
from loss.velocity import velocity_loss
from models.encoders import load_encoders, resize_tokens, resizing_notes
from models.interpolant import Noising, interpolate
from models.sit import build_sit
from models.vae import latent_statistics, load_vae
from models.vae_files import vae_sha256
from sampling.generation import SamplerConfig, preview
from training.ema import update_ema
from training.optimizer import Optimizer, adamw_settings, checkpoint_entries, restore
from training.run import Run
from utils.checkpoint import read_checkpoint
from utils.distributed import main_first
from utils.errors import InputError, command
from utils.images import image_grid
from utils.modules import load_strictly

PREVIEW_GUIDANCE = 4.0
CHECKPOINT_ENTRIES = ("model", "ema", "opt", "steps")


def train_step(
    run,
    nets: SimpleNamespace,
    optimizer: Optimizer,
    data: Iterator,
    step: int,
    *,
    micro_steps: int,
    noising: Noising,
    proj_coeff: float,
    ema_decay: float,
) -> dict[str, Tensor]:
    """One optimiser step of SiT over `micro_steps` batches; returns the scalars to log."""
    logs = {}
    for micro_step in range(micro_steps):
        # mean_std (B, 2C, h, w); images uint8 (B, 3, H, W) if there is an encoder to look at them; labels (B,)
        mean_std, *images, labels = (x.to(run.device, non_blocking=True) for x in next(data))
        with run.autocast():
            targets = [resize_tokens(encoder(*images), nets.sit.grid) for encoder in nets.encoders]  # (B, N, F)
        posterior_eps, noise, t, drop = noising.draw(run.draws(step, micro_step), nets.latent_shape)

        nets.sit.train()
        nets.sit.bn.eval()  # the VAE is frozen, and so is the normaliser of its latents
        x_0 = nets.sit.normalize(sample_mean_std(mean_std, posterior_eps))
        x_t, target = interpolate(x_0, noise, t, noising.path_type)
        with run.synchronised(nets.sit_ddp, when=micro_step == micro_steps - 1):
            with run.autocast():
                velocity, projections = nets.sit_ddp(x_t, t, labels, drop)
            denoising_loss = velocity_loss(velocity, target).mean()
            proj_loss = alignment_loss(projections, targets) if targets else denoising_loss.new_zeros(())
            sit_loss = denoising_loss + proj_coeff * proj_loss
            optimizer.backward(sit_loss / micro_steps)

        for name, value in dict(sit_loss=sit_loss, denoising_loss=denoising_loss, proj_loss=proj_loss).items():
            logs[name] = logs.get(name, 0) + value.detach() / micro_steps
    logs["grad_norm_sit"] = optimizer.step()
    update_ema(nets.ema, nets.sit, ema_decay)
    return logs


@command
def main(argv: list[str] | None = None) -> None:
    args = ldm_only_parser().parse_args(argv)
    run = Run(args)
    with main_first():
        data = ImageData(args.data_dir, resolution=args.resolution, num_classes=args.num_classes)
        latents = LatentData(Path(args.data_dir) / args.vae_latents_name, data)
        nets = build_networks(args, run, latents)
        loader = run.batches(LatentsAndLabels(latents, data, with_images=bool(nets.encoders)))
        for module in (nets.sit, nets.ema, nets.vae, *nets.encoders):
            module.to(run.device)
        optimizer = build_optimizer(args, nets, run)
        run.require_room([nets.sit], copies=[nets.ema])
    nets.checkpoint = None  # frees its tensors
    evaluate = online_evaluation(args, run)
    run.open_folder()
    nets.sit_ddp = run.wrap(nets.sit.train())
    if args.compile:
        nets.sit_ddp.compile()
        for encoder in nets.encoders:
            encoder.compile_network()
    settings = dict(
        micro_steps=args.gradient_accumulation_steps,
        noising=Noising(args.path_type, args.weighting, args.cfg_prob),
        proj_coeff=args.proj_coeff,
        ema_decay=args.ema_decay,
    )

    def log_evaluation(step: int) -> None:
        run.log_evaluation(step, evaluate(nets.ema, nets.vae, nets.sit.latent_stats()))

    progress = run.steps(data)
    if evaluate is not None and run.lacks_evaluation(args.eval_steps):
        log_evaluation(run.start_step)
    for step in progress:
        logs = train_step(run, nets, optimizer, loader, step, **settings)

        done = step + 1
        run.log(done, logs, progress)
        if run.is_due(done, args.checkpointing_steps):
            run.save(done, lambda done=done: checkpoint_contents(args, nets, optimizer, done))
        if evaluate is not None and run.is_due(done, args.eval_steps):
            log_evaluation(done)
        if args.num_preview and run.is_due(done, args.sampling_steps):
            log_previews(args, run, nets, done)
    run.close()


def build_networks(args, run: Run, latents: LatentData) -> SimpleNamespace:
    """All networks on the CPU; weights of SiT from the checkpoint that the run resumes, if it does."""
    torch.manual_seed(args.seed)  # of fresh weights; every other draw has a generator of its own
    nets = SimpleNamespace()
    nets.checkpoint = read_checkpoint(run.resume_from, need=CHECKPOINT_ENTRIES) if run.resume_from else None
    nets.encoders = load_encoders(args.enc_type, args.resolution, args.enc_ckpt)
    if not nets.encoders and args.proj_coeff > 0:
        raise InputError(f"--enc-type None was given; --proj-coeff 0 goes with it, not {args.proj_coeff}")
    nets.vae = load_vae(args.vae, args.vae_ckpt).requires_grad_(False)
    channels, *sides = latents.array.shape[1:]
    nets.latent_shape = (channels // 2, *sides)
    if nets.vae.config.latent_channels != nets.latent_shape[0]:
        raise InputError(
            f"--vae-latents-name: {latents.path}.npy holds latents of {nets.latent_shape[0]} channels; "
            f"the VAE of --vae-ckpt has {nets.vae.config.latent_channels}"
        )
    require_same_vae(args.vae_ckpt, nets.vae, latents)
    nets.sit = build_sit(
        args.model,
        nets.latent_shape,
        encoder_depth=args.encoder_depth,
        num_classes=args.num_classes,
        class_dropout_prob=args.cfg_prob,
        z_dims=[encoder.embed_dim for encoder in nets.encoders],
        qk_norm=args.qk_norm,
        fused_attn=args.fused_attn,
    )
    nets.sit.set_latent_stats(*(latent_statistics(args.vae_ckpt, nets.vae) or cached_statistics(latents)))
    run.notes += resizing_notes(nets.encoders, nets.sit.grid)
    nets.ema = copy.deepcopy(nets.sit).eval().requires_grad_(False)
    if nets.checkpoint is not None:
        load_strictly(nets.sit, nets.checkpoint["model"], f"{run.resume_from}: model")
        load_strictly(nets.ema, nets.checkpoint["ema"], f"{run.resume_from}: ema")
    return nets


def require_same_vae(vae_ckpt: str, vae: AutoencoderKL, latents: LatentData) -> None:
    """Refuse latents of one VAE beside the decoder of another."""
    cached = latents.info.get("vae_sha256")
    if cached and vae_sha256(vae_ckpt, vae) != cached:
        raise InputError(
            f"--vae-ckpt: {vae_ckpt} is not the VAE that {latents.path}.npy was cached with "
            f"({latents.info.get('vae')}); its samples would be decoded wrongly"
        )


def cached_statistics(latents: LatentData) -> tuple[Tensor, Tensor]:
    """Scale and bias (1, C, 1, 1) that cache_latents.py stored beside the latents."""
    scale, bias = (torch.tensor(latents.info[f"latents_{key}"]).view(1, -1, 1, 1) for key in ("scale", "bias"))
    return scale, bias


def build_optimizer(args, nets: SimpleNamespace, run: Run) -> Optimizer:
    """AdamW, with the moments of the checkpoint that the run resumes."""
    parameters = list(nets.sit.named_parameters())
    optimizer = Optimizer(parameters, lr=args.learning_rate, **adamw_settings(args, scale_loss=run.scales_loss))
    if nets.checkpoint is not None:
        restore({"opt": optimizer}, nets.checkpoint, str(run.resume_from))
    return optimizer


def checkpoint_contents(args, nets: SimpleNamespace, optimizer: Optimizer, step: int) -> dict:
    return {
        "model": nets.sit.state_dict(),
        "ema": nets.ema.state_dict(),
        **checkpoint_entries({"opt": optimizer}, {}),
        "args": vars(args),
        "steps": step,
    }


def log_previews(args, run: Run, nets: SimpleNamespace, step: int) -> None:
    """Samples of the EMA as a grid."""
    guidance = PREVIEW_GUIDANCE if nets.ema.null_label is not None else 1.0
    config = SamplerConfig(path_type=args.path_type, guidance_scale=guidance)
    samples = preview(
        nets.ema,
        nets.vae,
        nets.sit.latent_stats(),
        args.num_preview,
        args.seed,
        config,
        rank=run.rank,
        world_size=run.world_size,
    )
    if run.is_main:
        run.log_image(step, "samples", image_grid(samples, columns=8))
    run.wait()


if __name__ == "__main__":
    main()
