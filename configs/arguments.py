"""The command-line flags of all scripts, a parser for each; `configs/groups.py` has what several share.

Names and defaults are those of the public release; flags of our own say so in README's tables. Nothing here imports
torch, so `--help` and a mistyped flag answer at once.
"""

from argparse import Namespace

from configs.groups import (
    VAE_NAMES,
    add_alignment_flags,
    add_data_flags,
    add_dry_run_flag,
    add_feature_flags,
    add_online_evaluation_flags,
    add_run_flags,
    add_sit_flags,
    add_training_flags,
    add_unused_flags,
    add_vae_flags,
    add_vae_loss_flags,
)
from configs.parsing import (
    ArgumentParser,
    grid_shape,
    guidance_float,
    natural_float,
    natural_int,
    on_off,
    path,
    positive_int,
    refused,
    time_shift,
    unit_float,
)
from configs.presets import PRESETS


def repae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="REPA-E: train SiT and its VAE together (arXiv 2504.10483).")
    add_unused_flags(add_run_flags(parser))
    add_data_flags(parser)
    sit = add_sit_flags(parser)
    sit.add_argument("--bn-momentum", type=unit_float, default=0.1, help="of the latents' BatchNorm")
    sit.add_argument(
        "--sit-ckpt",
        type=path,
        help="start from a trained SiT: ours, REPA's, LightningDiT's or the original (default: fresh)",
    )
    align = add_alignment_flags(parser)
    align.add_argument("--vae-align-proj-coeff", type=natural_float, default=1.5, help="weight of VAE's alignment loss")
    reason = "here the VAE learns by the alignment to the end; train_ldm_only.py has this flag"
    align.add_argument("--proj-until", type=refused(reason), metavar="STEP", help=f"refused: {reason}")
    on_off(align, "--stop-grad", True, "keep the diffusion loss out of the VAE; without it the latents collapse")
    add_vae_flags(parser, default="f8d4", ckpt="pretrained/sdvae-f8d4/sdvae-f8d4.pt", fresh=True)
    loss = add_vae_loss_flags(parser, "--vae-learning-rate")
    loss.add_argument(
        "--vae-every", type=positive_int, default=1, help="VAE and discriminator learn at every so many steps alone"
    )
    add_online_evaluation_flags(parser)
    add_training_flags(parser, networks=("vae", "sit"))
    return parser


def ldm_only_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train SiT on the cached latents of a frozen VAE.")
    add_unused_flags(add_run_flags(parser))
    add_data_flags(parser)
    add_sit_flags(parser)
    align = add_alignment_flags(parser)
    align.add_argument("--proj-until", type=positive_int, metavar="STEP", help="no alignment after so many steps")
    vae = add_vae_flags(parser, default="f16d32", ckpt="pretrained/e2e-vavae-400k/e2e-vavae-400k.pt")
    vae.add_argument("--vae-latents-name", default="e2e-vavae-400k", help="latents cached by cache_latents.py")
    add_online_evaluation_flags(parser)
    add_training_flags(parser, networks=("sit",))
    parser.set_defaults(model="SiT-XL/1")
    return parser


def vae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a VAE alone: reconstruction, LPIPS, KL and GAN; from scratch or tuned.")
    add_run_flags(parser)
    add_data_flags(parser, labels=False)
    add_vae_flags(parser, default="f8d4", ckpt=None)
    add_vae_loss_flags(parser, "--learning-rate", "--vae-learning-rate")
    add_training_flags(parser, networks=("vae",), learning_rate=False)
    parser.set_defaults(max_train_steps=100000)
    return parser


def generate_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Draw samples from a trained SiT into the ADM suite's .npz.")
    run = parser.add_argument_group("trained run")
    add_preset_flag(run)
    run.add_argument("--exp-path", type=path, help="run folder or checkpoint file (needed, unless --preset names one)")
    run.add_argument("--train-steps", help="which checkpoint (default: the latest)")
    run.add_argument("--vae-ckpt", type=path, help="VAE, where neither the checkpoint nor args.json lead to one")
    on_off(run, "--ema", True, "the moving average of SiT's weights")

    samples = parser.add_argument_group("samples")
    samples.add_argument("--sample-dir", type=path, default="samples", help="where the samples go")
    samples.add_argument("--num-fid-samples", type=positive_int, default=50000, help="how many samples")
    samples.add_argument("--global-seed", type=natural_int, default=0, help="sample i depends on (this, i) alone")
    samples.add_argument("--grid", type=grid_shape, default="8x8", metavar="RxC", help="shape of the contact sheet")
    on_off(samples, "--trajectory", False, "also a picture of 8 samples on their way from noise")
    on_off(samples, "--save-png", False, "also write every sample as PNG")
    replaced = "an existing result, or an interrupted job of other options, of this name"
    on_off(samples, "--overwrite", False, f"replace {replaced}")
    add_dry_run_flag(samples)

    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--mode", default="ode", choices=["ode", "sde"], help="Euler or Heun; or Euler-Maruyama")
    on_off(sampler, "--heun", False, "second-order steps (ode only)")
    sampler.add_argument("--num-steps", type=positive_int, default=50, help="steps of the sampler")
    sampler.add_argument(
        "--time-shift", type=time_shift, default=1.0, metavar="{S,auto}", help="times become S t / (1 + (S - 1) t)"
    )
    sampler.add_argument("--path-type", default="linear", choices=["linear", "cosine"], help="as the model was trained")
    sampler.add_argument(
        "--cfg-scale", type=guidance_float, default=1.5, help="of guidance, which is classifier-free; 1: off"
    )
    sampler.add_argument(
        "--guidance-channels", type=positive_int, metavar="C", help="guide so many of the first channels (default: all)"
    )
    sampler.add_argument(
        "--guide-exp-path", type=path, help="autoguidance: a weaker run of the same latents, in place of the null label"
    )
    sampler.add_argument("--guide-train-steps", help="which of its checkpoints (default: the latest)")
    sampler.add_argument("--guidance-low", type=unit_float, default=0.0, help="guidance only for t >= this")
    sampler.add_argument("--guidance-high", type=unit_float, default=1.0, help="guidance only for t <= this")

    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--label-sampling",
        default="random",
        choices=["random", "equal"],
        help="class of each sample: uniform draw, or the same count of every class",
    )
    labels.add_argument(
        "--num-classes", type=positive_int, help="draw from [0, this) (default: the classes that the run saw)"
    )
    labels.add_argument("--classes", help="only these, between commas; null: the unconditional network")
    labels.add_argument("--label-file", type=path, help=".npy or text file with the label of each sample")

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
    space.add_argument(
        "--evaluate", type=path, metavar="REFERENCE", help="also measure the samples, as evaluate.py --reference"
    )
    return parser


def add_preset_flag(parser) -> None:
    parser.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help="options of a published result; flags beside it win"
    )


def generate_arguments(argv: list[str] | None = None) -> Namespace:
    """The options of generate.py: what --preset sets where nothing else is given, then the defaults.

    A preset's --train-steps is that of its own run; with another --exp-path the latest checkpoint counts, as without.
    """
    parser = generate_parser()
    first = ArgumentParser(add_help=False)
    add_preset_flag(first)
    name = first.parse_known_args(argv)[0].preset
    options = {} if name is None else PRESETS[name].options
    parser.set_defaults(**{key: value for key, value in options.items() if key != "train_steps"})
    args = parser.parse_args(argv)
    if args.exp_path is None:
        parser.error("--exp-path: nothing was given; the folder of a run, or --preset NAME, is needed")
    if args.train_steps is None and args.exp_path == options.get("exp_path"):
        args.train_steps = options["train_steps"]
    return args


def save_vae_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Take the tuned VAE out of a checkpoint of REPA-E or train_vae.py.")
    parser.add_argument(
        "--repae-ckpt", type=path, required=True, help="checkpoint of train_repae.py, train_vae.py or the public code"
    )
    parser.add_argument("--vae-name", default="e2e-vae", help="name of the folder and of the files")
    parser.add_argument("--save-dir", type=path, default="exps", help="where <vae-name>/ is made")
    parser.add_argument("--vae", choices=VAE_NAMES, help="architecture (default: read from the checkpoint)")
    on_off(parser, "--overwrite", False, "replace existing files of this name")
    return parser


def cache_parser() -> ArgumentParser:
    name = "repae-invae-400k"
    parser = ArgumentParser(description="Cache the latents' mean and std of a data folder under a frozen VAE.")
    parser.add_argument("--vae-arch", default="f16d32", choices=[*VAE_NAMES, "auto"], help="architecture")
    ckpt = f"pretrained/{name}/{name}.pt"
    parser.add_argument("--vae-ckpt-path", type=path, default=ckpt, help="VAE, as --vae-ckpt elsewhere")
    parser.add_argument("--vae-latents-name", default=name, help="name of the cache")
    parser.add_argument("--data-dir", type=path, default="data", help="folder written by preprocessing.py")
    parser.add_argument("--output-dir", type=path, help="where <vae-latents-name>.npy goes (default: --data-dir)")
    parser.add_argument("--pproc-batch-size", type=positive_int, default=128, help="images at a time per process")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the cache")
    parser.add_argument("--num-workers", type=natural_int, default=4, help="loader processes per process")
    on_off(parser, "--overwrite", False, "replace a finished cache of this name")
    return parser


def preprocessing_parser() -> ArgumentParser:
    parser = ArgumentParser(description="A folder of images -> the data folder of the training scripts.")
    parser.add_argument("--imagenet-path", type=path, required=True, help="any folder tree of images")
    parser.add_argument("--output-path", type=path, default="data", help="the data folder to write")
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
    images = ".npz of generate.py (or any with arr_0), .npy, or a folder of images"
    samples.add_argument("--samples", type=path, help=images)
    known = "ADM reference .npz, EDM2 .pkl, a --save-stats file, or images like --samples"
    samples.add_argument("--reference", type=path, help=known)
    saved = "write the statistics of --reference to this .npz, once"
    samples.add_argument("--save-stats", type=path, metavar="FILE", help=saved)
    on_off(samples, "--overwrite", False, "replace an existing --save-stats file")
    add_feature_flags(parser, more=", or none (with --reconstruct)")
    vae = parser.add_argument_group("reconstruction")
    on_off(vae, "--reconstruct", False, "evaluate a VAE: rFID, PSNR, SSIM, LPIPS, and a picture")
    vae.add_argument(
        "--vae-ckpt", type=path, nargs="+", metavar="VAE", help="one VAE, or two to compare (before, after)"
    )
    vae.add_argument("--vae", nargs="+", default=["auto"], choices=[*VAE_NAMES, "auto"], help="architecture of each")
    vae.add_argument("--data-dir", type=path, default="data", help="data folder, or images like --samples")
    vae.add_argument("--max-images", type=positive_int, help="take only so many images, evenly spread")
    vae.add_argument("--num-picture", type=natural_int, default=8, help="images of the picture; 0 for none")
    on_off(vae, "--lpips", True, "measure LPIPS")
    vae.add_argument("--lpips-weights", type=path, help="torchvision vgg16 state dict (default: downloaded once)")
    run = parser.add_argument_group("run")
    run.add_argument("--samples-range", choices=["0,1", "-1,1"], help="black and white in images that are floats")
    run.add_argument("--batch-size", type=positive_int, default=64, help="images at a time per process")
    run.add_argument(
        "--output", type=path, metavar="FILE.json", help="where the numbers go (default: beside what is evaluated)"
    )
    return parser
