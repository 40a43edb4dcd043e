"""The command-line flags of all scripts, declared once: first the groups that scripts share, then a parser for each.

Names and defaults are those of the public release; flags of our own say so in README's tables. Nothing here imports
torch, so `--help` and a mistyped flag answer at once.
"""

from configs.parsing import (
    ArgumentParser,
    grid_shape,
    guidance_float,
    natural_float,
    natural_int,
    on_off,
    positive_float,
    positive_int,
    unit_float,
)

SIT_NAMES = [f"SiT-{size}/{patch}" for size in ("T", "S", "B", "L", "XL") for patch in (1, 2, 4, 8)]
VAE_NAMES = ["f8d4", "f16d32", "f4d4-tiny"]

# Groups that several scripts share; where a function returns its group, a script adds flags of its own to it.


def add_run_flags(parser) -> None:
    """Where a training run lives, how it resumes, what it reports."""
    run = parser.add_argument_group("run")
    run.add_argument("--exp-name", required=True, help="name of the run's folder under --output-dir")
    run.add_argument("--output-dir", default="exps", help="where run folders are made")
    run.add_argument("--logging-dir", default="logs", help="the tracker's folder, inside the run's folder")
    run.add_argument("--report-to", default="wandb", choices=["wandb", "tensorboard", "none"], help="tracker")
    run.add_argument("--log-steps", type=positive_int, default=100, help="steps between two rows of scalars")
    run.add_argument("--sampling-steps", type=positive_int, default=10000, help="steps between two preview grids")
    run.add_argument("--num-preview", type=natural_int, default=64, help="images of a preview grid; 0 for no previews")
    run.add_argument("--checkpointing-steps", type=positive_int, default=50000, help="steps between two checkpoints")
    run.add_argument(
        "--resume",
        metavar="{latest,STEP}",
        help="go on from this checkpoint of the run's own folder; 'latest' starts afresh where there is none yet",
    )
    run.add_argument("--resume-step", type=natural_int, default=0, help="as --resume STEP (0: off)")
    run.add_argument("--continue-train-exp-dir", help="the run folder that --resume-step reads from, if not its own")
    on_off(run, "--overwrite", False, "delete an existing run folder of this name and start afresh")
    run.add_argument("--wandb-history-path", help="accepted and unused, as in the public code")


def add_online_evaluation_flags(parser) -> None:
    """An FID curve while training (docs/evaluation.md, "While training")."""
    online = parser.add_argument_group("online evaluation")
    online.add_argument("--eval-steps", type=natural_int, default=0, help="steps between two evaluations; 0: none")
    online.add_argument("--eval-reference", help="what samples are compared with, as evaluate.py's --reference")
    online.add_argument("--eval-samples", type=positive_int, default=5000, help="samples of an evaluation")
    online.add_argument("--eval-features", default="inception", help="feature space, as evaluate.py's --features")
    online.add_argument("--eval-weights", help="weights file of the feature network (default: downloaded once)")


def add_training_flags(parser) -> None:
    """Length, batch, optimiser, precision: what all training scripts share."""
    train = parser.add_argument_group("training")
    train.add_argument("--max-train-steps", type=positive_int, default=400000, help="optimiser steps in all")
    train.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data at most")
    train.add_argument("--batch-size", type=positive_int, default=256, help="images of a (micro-)step, all processes")
    train.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="micro-steps of a step")
    train.add_argument("--learning-rate", type=natural_float, default=1e-4, help="AdamW's, constant")
    train.add_argument("--adam-beta1", type=unit_float, default=0.9, help="AdamW's beta 1")
    train.add_argument("--adam-beta2", type=unit_float, default=0.999, help="AdamW's beta 2")
    train.add_argument("--adam-weight-decay", type=natural_float, default=0.0, help="AdamW's weight decay")
    train.add_argument("--adam-epsilon", type=positive_float, default=1e-8, help="AdamW's epsilon")
    train.add_argument("--max-grad-norm", type=positive_float, default=1.0, help="gradients are clipped to this norm")
    train.add_argument("--mixed-precision", default="fp16", choices=["no", "fp16", "bf16"], help="autocast of networks")
    on_off(train, "--allow-tf32", True, "TF32 products in float32 code on CUDA")
    on_off(train, "--compile", None, "torch.compile the networks (default: on CUDA yes, without no)")
    on_off(train, "--deterministic", False, "bit-reproducible CUDA kernels, at some speed")
    train.add_argument("--seed", type=natural_int, default=0, help="of every random draw")


def add_data_flags(parser) -> None:
    """The data folder, and what the images and labels in it must be."""
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="data", help="folder written by preprocessing.py")
    data.add_argument("--resolution", type=positive_int, default=256, help="of the images in the data folder")
    data.add_argument("--num-classes", type=positive_int, default=1000, help="class labels lie in [0, this)")
    data.add_argument("--num-workers", type=natural_int, default=4, help="loader processes per process")


def add_sit_flags(parser):
    """The transformer, the path and how t is drawn; returns the group."""
    sit = parser.add_argument_group("SiT")
    sit.add_argument(
        "--model",
        "--models",
        default="SiT-XL/2",
        choices=SIT_NAMES,
        metavar="SiT-{T,S,B,L,XL}/{1,2,4,8}",
        help="size and patch",
    )
    sit.add_argument("--encoder-depth", type=positive_int, default=8, help="block whose tokens are aligned, from 1")
    on_off(sit, "--qk-norm", False, "LayerNorm on queries and keys")
    on_off(sit, "--fused-attn", True, "torch's fused attention")
    sit.add_argument("--cfg-prob", type=unit_float, default=0.1, help="share of labels dropped to the null label")
    sit.add_argument("--ema-decay", type=unit_float, default=0.9999, help="of SiT's EMA, which sampling uses")
    sit.add_argument("--path-type", default="linear", choices=["linear", "cosine"], help="data to noise")
    sit.add_argument("--prediction", default="v", choices=["v"], help="what SiT predicts: the velocity")
    sit.add_argument("--weighting", default="uniform", choices=["uniform", "lognormal"], help="how t is drawn")
    return sit


def add_alignment_flags(parser):
    """The frozen encoders and the weight of SiT's alignment with them; returns the group."""
    align = parser.add_argument_group("alignment")
    align.add_argument("--enc-type", default="dinov2-vit-b", help="frozen encoder(s), comma list, timm:NAME, or None")
    align.add_argument("--enc-ckpt", help="weights file of the encoder (comma list for several)")
    align.add_argument("--proj-coeff", type=natural_float, default=0.5, help="weight of SiT's alignment loss")
    return align


def add_vae_flags(parser, *, default: str, ckpt: str | None):
    """Which VAE; returns the group."""
    vae = parser.add_argument_group("VAE")
    vae.add_argument(
        "--vae",
        default=default,
        choices=[*VAE_NAMES, "auto"],
        help="architecture; auto takes it from the diffusers folder that --vae-ckpt names",
    )
    vae.add_argument("--vae-ckpt", default=ckpt, help=".pt (LDM keys), .safetensors or a diffusers folder")
    return vae


def add_vae_loss_flags(parser) -> None:
    """The VAE's losses, its discriminator, and the learning rates of both."""
    loss = parser.add_argument_group("VAE loss")
    loss.add_argument("--loss-cfg-path", default="configs/l1_lpips_kl_gan.yaml", help="weights of the VAE's losses")
    loss.add_argument("--lpips-weights", help="torchvision vgg16 state dict (default: downloaded once)")
    loss.add_argument("--disc-pretrained-ckpt", help="discriminator to start from (default: fresh)")
    loss.add_argument("--vae-learning-rate", type=natural_float, default=1e-4, help="of the VAE's AdamW")
    loss.add_argument("--disc-learning-rate", type=natural_float, default=1e-4, help="of the discriminator's AdamW")


def add_feature_flags(parser, *, more: str = ""):
    """The space in which sets of images are compared; returns the group."""
    space = parser.add_argument_group("feature space")
    space.add_argument(
        "--features",
        default="inception",
        help=f"inception (FID), dinov2-vit-l (FD-DINOv2), any other --enc-type (FD of its mean token){more}",
    )
    space.add_argument("--inception-weights", help="torch-fidelity's weights file (default: downloaded once)")
    space.add_argument("--enc-ckpt", help="weights file of another --features network")
    return space


# The scripts


def repae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="REPA-E: train SiT and its VAE together (arXiv 2504.10483).")
    add_run_flags(parser)
    add_data_flags(parser)
    sit = add_sit_flags(parser)
    sit.add_argument("--bn-momentum", type=unit_float, default=0.1, help="of the latents' BatchNorm")
    align = add_alignment_flags(parser)
    align.add_argument("--vae-align-proj-coeff", type=natural_float, default=1.5, help="weight of VAE's alignment loss")
    on_off(align, "--stop-grad", True, "keep the diffusion loss out of the VAE; without it the latents collapse")
    add_vae_flags(parser, default="f8d4", ckpt="pretrained/sdvae-f8d4/sdvae-f8d4.pt")
    add_vae_loss_flags(parser)
    add_online_evaluation_flags(parser)
    add_training_flags(parser)
    return parser


def ldm_only_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train SiT on the cached latents of a frozen VAE.")
    add_run_flags(parser)
    add_data_flags(parser)
    add_sit_flags(parser)
    add_alignment_flags(parser)
    vae = add_vae_flags(parser, default="f16d32", ckpt="pretrained/e2e-vavae-400k/e2e-vavae-400k.pt")
    vae.add_argument("--vae-latents-name", default="e2e-vavae-400k", help="latents cached by cache_latents.py")
    add_online_evaluation_flags(parser)
    add_training_flags(parser)
    parser.set_defaults(model="SiT-XL/1")
    return parser


def vae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a VAE alone: reconstruction, LPIPS, KL and GAN; from scratch or tuned.")
    add_run_flags(parser)
    add_data_flags(parser)
    add_vae_flags(parser, default="f8d4", ckpt=None)
    add_vae_loss_flags(parser)
    add_training_flags(parser)
    parser.set_defaults(max_train_steps=100000)
    return parser


def generate_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Draw samples from a trained SiT into the ADM suite's .npz.")
    run = parser.add_argument_group("trained run")
    run.add_argument("--exp-path", required=True, help="run folder: args.json and checkpoints/")
    run.add_argument("--train-steps", help="which checkpoint (default: the latest)")
    run.add_argument("--vae-ckpt", help="VAE, where neither the checkpoint nor args.json lead to one")
    on_off(run, "--ema", True, "the moving average of SiT's weights")

    samples = parser.add_argument_group("samples")
    samples.add_argument("--sample-dir", default="samples", help="where the samples go")
    samples.add_argument("--num-fid-samples", type=positive_int, default=50000, help="how many samples")
    samples.add_argument("--global-seed", type=natural_int, default=0, help="sample i depends on (this, i) alone")
    samples.add_argument("--grid", type=grid_shape, default="8x8", metavar="RxC", help="shape of the contact sheet")
    on_off(samples, "--trajectory", False, "also a picture of 8 samples on their way from noise")
    on_off(samples, "--save-png", False, "also write every sample as PNG")
    replaced = "an existing result, or an interrupted job of other options, of this name"
    on_off(samples, "--overwrite", False, f"replace {replaced}")

    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--mode", default="ode", choices=["ode", "sde"], help="Euler or Heun; or Euler-Maruyama")
    on_off(sampler, "--heun", False, "second-order steps (ode only)")
    sampler.add_argument("--num-steps", type=positive_int, default=50, help="steps of the sampler")
    sampler.add_argument("--path-type", default="linear", choices=["linear", "cosine"], help="as the model was trained")
    sampler.add_argument("--cfg-scale", type=guidance_float, default=1.5, help="classifier-free guidance; 1: off")
    sampler.add_argument("--guidance-low", type=unit_float, default=0.0, help="guidance only for t >= this")
    sampler.add_argument("--guidance-high", type=unit_float, default=1.0, help="guidance only for t <= this")

    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--label-sampling",
        default="random",
        choices=["random", "equal"],
        help="class of each sample: uniform draw, or the same count of every class",
    )
    labels.add_argument("--num-classes", type=positive_int, help="classes to draw from (default: the model's)")
    labels.add_argument("--classes", help="only these classes, between commas")
    labels.add_argument("--label-file", help=".npy or text file with the label of each sample")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--pproc-batch-size",
        type=positive_int,
        default=256,
        help="samples at a time per process; a short last batch is filled up",
    )
    machine.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16", "fp16"],
        help="of SiT; bf16 and fp16: autocast (default: tf32, or fp32 under --no-tf32)",
    )
    on_off(machine, "--tf32", True, "TF32 products in float32 code on CUDA")
    on_off(machine, "--compile", False, "torch.compile SiT")

    space = add_feature_flags(parser)
    space.add_argument("--evaluate", metavar="REFERENCE", help="also measure the samples, as evaluate.py --reference")
    return parser


def save_vae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Take the tuned VAE out of a REPA-E checkpoint.")
    parser.add_argument("--repae-ckpt", required=True, help="checkpoint of train_repae.py or of the public code")
    parser.add_argument("--vae-name", default="e2e-vae", help="name of the folder and of the files")
    parser.add_argument("--save-dir", default="exps", help="where <vae-name>/ is made")
    parser.add_argument("--vae", choices=VAE_NAMES, help="architecture (default: read from the checkpoint)")
    on_off(parser, "--overwrite", False, "replace existing files of this name")
    return parser


def cache_parser() -> ArgumentParser:
    name = "repae-invae-400k"
    parser = ArgumentParser(description="Cache the latents' mean and std of a data folder under a frozen VAE.")
    parser.add_argument("--vae-arch", default="f16d32", choices=[*VAE_NAMES, "auto"], help="architecture")
    parser.add_argument("--vae-ckpt-path", default=f"pretrained/{name}/{name}.pt", help="VAE weights")
    parser.add_argument("--vae-latents-name", default=name, help="name of the cache")
    parser.add_argument("--data-dir", default="data", help="folder written by preprocessing.py")
    parser.add_argument("--output-dir", default="data", help="where <vae-latents-name>.npy goes")
    parser.add_argument("--pproc-batch-size", type=positive_int, default=128, help="images at a time per process")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the cache")
    parser.add_argument("--num-workers", type=natural_int, default=4, help="loader processes per process")
    on_off(parser, "--overwrite", False, "replace a finished cache of this name")
    return parser


def preprocessing_parser() -> ArgumentParser:
    parser = ArgumentParser(description="A folder of images -> the data folder of the training scripts.")
    parser.add_argument("--imagenet-path", required=True, help="any folder tree of images")
    parser.add_argument("--output-path", default="data", help="the data folder to write")
    parser.add_argument("--resolution", type=positive_int, default=256, help="images become R x R (ADM centre crop)")
    parser.add_argument("--num-workers", type=positive_int, default=16, help="processes")
    parser.add_argument(
        "--max-images", type=positive_int, help="take so many, spread over the classes: of each the first"
    )
    parser.add_argument("--on-error", default="skip", choices=["skip", "stop"], help="for an unreadable image")
    on_off(parser, "--exif-orientation", False, "turn images as their EXIF tag says (the public code does not)")
    on_off(parser, "--overwrite", False, "replace an existing data folder")
    return parser


def evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(description="FID, sFID, IS, precision and recall of samples; or a VAE's reconstructions.")
    samples = parser.add_argument_group("samples against a reference")
    samples.add_argument("--samples", help=".npz of generate.py (or any with arr_0), .npy, or a folder of images")
    samples.add_argument(
        "--reference", help="ADM reference .npz, EDM2 .pkl, a --save-stats file, or images like --samples"
    )
    samples.add_argument("--save-stats", metavar="FILE", help="write the statistics of --reference to this .npz, once")
    on_off(samples, "--overwrite", False, "replace an existing --save-stats file")
    add_feature_flags(parser, more=", or none (with --reconstruct)")
    vae = parser.add_argument_group("reconstruction")
    on_off(vae, "--reconstruct", False, "evaluate a VAE: rFID, PSNR, SSIM, LPIPS, and a picture")
    vae.add_argument("--vae-ckpt", nargs="+", metavar="VAE", help="one VAE, or two to compare (before, after)")
    vae.add_argument("--vae", nargs="+", default=["auto"], choices=[*VAE_NAMES, "auto"], help="architecture of each")
    vae.add_argument("--data-dir", default="data", help="data folder, or images like --samples")
    vae.add_argument("--max-images", type=positive_int, help="take only so many images, evenly spread")
    vae.add_argument("--num-picture", type=natural_int, default=8, help="images of the picture; 0 for none")
    on_off(vae, "--lpips", True, "measure LPIPS")
    vae.add_argument("--lpips-weights", help="torchvision vgg16 state dict (default: downloaded once)")
    run = parser.add_argument_group("run")
    run.add_argument("--samples-range", choices=["0,1", "-1,1"], help="black and white in images that are floats")
    run.add_argument("--batch-size", type=positive_int, default=64, help="images at a time per process")
    run.add_argument("--output", metavar="FILE.json", help="where the numbers go (default: beside what is evaluated)")
    return parser
