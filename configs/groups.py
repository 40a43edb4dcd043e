"""Groups of flags that several scripts share; where a function returns its group, a script adds its own flags to it."""

import os

from configs.parsing import (
    OneSpelling,
    Shipped,
    encoders,
    natural_float,
    natural_int,
    on_off,
    path,
    paths,
    positive_float,
    positive_int,
    some_of,
    time_shift,
    unit_float,
    weighting,
)

SIT_NAMES = [
    *(f"SiT-{size}/{patch}" for size in ("T", "S", "B", "L", "XL") for patch in (1, 2, 4, 8)),
    *(f"LightningDiT-{size}/{patch}" for size in ("T", "B", "L", "XL") for patch in (1, 2)),
]
VAE_NAMES = ["f8d4", "f16d32", "f4d4-tiny"]


def add_run_flags(parser):
    """Where a training run lives, how it resumes, what it reports; returns the group."""
    run = parser.add_argument_group("run")
    run.add_argument("--exp-name", required=True, help="name of the run's folder under --output-dir")
    run.add_argument("--output-dir", type=path, default="exps", help="where run folders are made")
    run.add_argument("--logging-dir", type=path, default="logs", help="the tracker's folder, inside the run's folder")
    run.add_argument("--report-to", default="wandb", choices=["wandb", "tensorboard", "none"], help="tracker")
    run.add_argument("--log-steps", type=positive_int, default=100, help="steps between two rows of scalars")
    run.add_argument("--sampling-steps", type=positive_int, default=10000, help="steps between two preview grids")
    run.add_argument("--num-preview", type=natural_int, default=64, help="images of a preview grid; 0 for no previews")
    run.add_argument("--checkpointing-steps", type=positive_int, default=50000, help="steps between two checkpoints")
    run.add_argument(
        "--checkpoints-total-limit", type=positive_int, help="how many checkpoints stay, the newest (default: all)"
    )
    run.add_argument(
        "--keep-every", type=positive_int, help="checkpoints of multiples of so many steps stay beyond that limit"
    )
    run.add_argument(
        "--max-hours",
        type=positive_float,
        help="stop after so long with a checkpoint, as SIGTERM does (default: never)",
    )
    run.add_argument(
        "--resume",
        metavar="{latest,STEP}",
        help="go on from this checkpoint of the run's own folder; 'latest' starts afresh where there is none yet",
    )
    run.add_argument("--resume-step", type=natural_int, default=0, help="as --resume STEP (0: off)")
    run.add_argument(
        "--continue-train-exp-dir", type=path, help="the run folder that --resume-step reads from, if not its own"
    )
    on_off(run, "--overwrite", False, "delete an existing run folder of this name and start afresh")
    add_dry_run_flag(run)
    return run


def add_dry_run_flag(group) -> None:
    group.add_argument(
        "--dry-run",
        type=positive_int,
        nargs="?",
        const=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="PROCESSES",
        help="print what the job will cost on so many processes (by itself: the launcher's), and stop",
    )


def add_unused_flags(run) -> None:
    """What the commands of the public release may carry, and nothing reads, there or here."""
    run.add_argument("--wandb-history-path", type=path, help="accepted and unused, as in the public code")


def add_online_evaluation_flags(parser) -> None:
    """An FID curve while training (docs/evaluation.md, "While training")."""
    online = parser.add_argument_group("online evaluation")
    online.add_argument("--eval-steps", type=natural_int, default=0, help="steps between two evaluations; 0: none")
    online.add_argument(
        "--eval-reference", type=path, help="what samples are compared with, as evaluate.py's --reference"
    )
    online.add_argument("--eval-samples", type=positive_int, default=5000, help="samples of an evaluation")
    online.add_argument(
        "--eval-features", type=encoders, default="inception", help="feature space, as evaluate.py's --features"
    )
    online.add_argument(
        "--eval-weights", type=path, help="weights file of the feature network (default: downloaded once)"
    )


def add_training_flags(parser, *, networks: tuple[str, ...], learning_rate: bool = True) -> None:
    """Length, batch, optimiser, precision: what all training scripts share; SiT's learning rate where there is one.

    `networks` are those that can be checkpointed: "vae", "sit".
    """
    train = parser.add_argument_group("training")
    train.add_argument("--max-train-steps", type=positive_int, default=400000, help="optimiser steps in all")
    train.add_argument("--epochs", type=positive_int, help="passes over the data at most (default: no limit)")
    train.add_argument("--batch-size", type=positive_int, default=256, help="images of a (micro-)step, all processes")
    train.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="micro-steps of a step")
    if learning_rate:
        train.add_argument("--learning-rate", type=natural_float, default=1e-4, help="of SiT's AdamW")
    _add_schedule_flags(train)
    train.add_argument("--adam-beta1", type=unit_float, default=0.9, help="AdamW's beta 1")
    train.add_argument("--adam-beta2", type=unit_float, default=0.999, help="AdamW's beta 2")
    train.add_argument("--adam-weight-decay", type=natural_float, default=0.0, help="AdamW's weight decay")
    train.add_argument("--adam-epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon")
    train.add_argument("--max-grad-norm", type=positive_float, default=1.0, help="gradients are clipped to this norm")
    train.add_argument(
        "--max-bad-steps",
        type=positive_int,
        default=50,
        help="the run stops after so many steps in a row without a finite gradient norm of one network",
    )
    train.add_argument("--mixed-precision", default="fp16", choices=["no", "fp16", "bf16"], help="autocast of networks")
    on_off(train, "--allow-tf32", True, "TF32 products in float32 code on CUDA")
    on_off(train, "--compile", None, "torch.compile the networks (default: on CUDA yes, without no)")
    train.add_argument(
        "--grad-checkpoint",
        type=some_of(*networks),
        default=[],
        metavar=",".join(networks),
        help="networks whose backward pass computes their activations again: less memory, more time",
    )
    on_off(train, "--deterministic", False, "bit-reproducible CUDA kernels, at some speed")
    train.add_argument("--seed", type=natural_int, default=0, help="of every random draw")


def _add_schedule_flags(train) -> None:
    """How the learning rates of all optimisers move, each as a share of its own."""
    train.add_argument(
        "--warmup-steps", type=natural_int, default=0, help="steps in which every learning rate rises to its value"
    )
    train.add_argument(
        "--lr-schedule",
        default="constant",
        choices=["constant", "linear", "cosine"],
        help="how every learning rate falls then, until --max-train-steps",
    )
    train.add_argument(
        "--lr-final", type=unit_float, default=0.0, help="what is left of every learning rate at the end, as a share"
    )
    train.add_argument(
        "--lr-decay-start", type=natural_int, help="step at which the rates begin to fall (default: after the warm-up)"
    )


def add_data_flags(parser, *, labels: bool = True) -> None:
    """The data folder, and what the images, and the labels where they are read, must be."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=path, default="data", help="folder written by preprocessing.py")
    data.add_argument("--resolution", type=positive_int, default=256, help="of the images in the data folder")
    if labels:
        data.add_argument(
            "--num-classes", type=positive_int, help="labels lie in [0, this) (default: the data folder's)"
        )
    data.add_argument("--num-workers", type=natural_int, default=4, help="loader processes per process")


def add_sit_flags(parser):
    """The transformer, the path and how t is drawn; returns the group."""
    sit = parser.add_argument_group("SiT")
    sit.add_argument(
        "--model",
        "--models",
        action=OneSpelling,
        default="SiT-XL/2",
        choices=SIT_NAMES,
        metavar="SiT-{T,S,B,L,XL}/{1,2,4,8} or LightningDiT-{T,B,L,XL}/{1,2}",
        help="SiT or LightningDiT, size and patch",
    )
    sit.add_argument("--encoder-depth", type=positive_int, default=8, help="block whose tokens are aligned, from 1")
    on_off(sit, "--qk-norm", False, "LayerNorm (LightningDiT: RMSNorm) on queries and keys")
    on_off(sit, "--fused-attn", True, "torch's fused attention")
    sit.add_argument("--cfg-prob", type=unit_float, default=0.1, help="share of labels dropped to the null label")
    sit.add_argument("--ema-decay", type=unit_float, default=0.9999, help="of SiT's EMA, which sampling uses")
    sit.add_argument("--path-type", default="linear", choices=["linear", "cosine"], help="data to noise")
    sit.add_argument("--prediction", default="v", choices=["v"], help="what SiT predicts: the velocity")
    sit.add_argument(
        "--weighting",
        type=weighting,
        default="uniform",
        choices=["uniform", "lognormal"],
        help="how t is drawn; logit-normal is another word for lognormal, and is stored as that",
    )
    sit.add_argument(
        "--time-shift", type=time_shift, default=1.0, metavar="{S,auto}", help="t becomes S t / (1 + (S - 1) t)"
    )
    sit.add_argument(
        "--cosine-coeff", type=natural_float, default=0.0, help="weight of the velocity's direction loss; 0: off"
    )
    return sit


def add_alignment_flags(parser):
    """The frozen encoders and the weight of SiT's alignment with them; returns the group."""
    align = parser.add_argument_group("alignment")
    align.add_argument(
        "--enc-type", type=encoders, default="dinov2-vit-b", help="frozen encoder(s), comma list, timm:NAME, or None"
    )
    align.add_argument("--enc-ckpt", type=paths, help="weights file of the encoder (comma list for several)")
    align.add_argument("--proj-coeff", type=natural_float, default=0.5, help="weight of SiT's alignment loss")
    align.add_argument(
        "--projector", default="mlp", choices=["mlp", "conv1", "conv3"], help="from SiT's tokens to the encoder's"
    )
    align.add_argument(
        "--spatial-norm", type=unit_float, metavar="ALPHA", help="normalise the encoder's tokens over space (iREPA)"
    )
    return align


def add_vae_flags(parser, *, default: str, ckpt: str | None, fresh: bool = False):
    """Which VAE, one with fresh weights where that can be; returns the group."""
    vae = parser.add_argument_group("VAE")
    vae.add_argument(
        "--vae",
        default=default,
        choices=[*VAE_NAMES, "auto"],
        help="architecture; auto takes it from what --vae-ckpt names",
    )
    more = "; none: fresh weights" if fresh else ""
    vae.add_argument(
        "--vae-ckpt", type=path, default=ckpt, help=f"file, checkpoint, diffusers folder or hub name{more}"
    )
    return vae


def add_vae_loss_flags(parser, *learning_rate: str):
    """The VAE's losses, its discriminator, and the learning rates of both, of which the VAE's has these spellings;
    returns the group."""
    loss = parser.add_argument_group("VAE loss")
    loss.add_argument(
        "--loss-cfg-path",
        type=path,
        default=Shipped("configs/l1_lpips_kl_gan.yaml"),
        help="weights of the VAE's losses",
    )
    on_off(loss, "--tune-convolutions", False, "channels_last and cuDNN's choice by trial; sums round otherwise")
    loss.add_argument("--lpips-weights", type=path, help="torchvision vgg16 state dict (default: downloaded once)")
    loss.add_argument("--disc-pretrained-ckpt", type=path, help="discriminator to start from (default: fresh)")
    loss.add_argument(
        *learning_rate,
        action=OneSpelling,
        dest="vae_learning_rate",
        type=natural_float,
        default=1e-4,
        help="of the VAE's AdamW",
    )
    loss.add_argument("--disc-learning-rate", type=natural_float, default=1e-4, help="of the discriminator's AdamW")
    return loss


def add_feature_flags(parser, *, more: str = ""):
    """The space in which sets of images are compared; returns the group."""
    space = parser.add_argument_group("feature space")
    space.add_argument(
        "--features",
        type=encoders,
        default="inception",
        help=f"inception (FID), dinov2-vit-l (FD-DINOv2), any other --enc-type (FD of its mean token){more}",
    )
    space.add_argument(
        "--inception-weights", type=path, help="torch-fidelity's weights file (default: downloaded once)"
    )
    space.add_argument("--enc-ckpt", type=path, help="weights file of another --features network")
    return space
