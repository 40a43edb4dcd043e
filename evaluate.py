"""Measure samples against a reference, or a VAE's reconstructions against their originals.

    python evaluate.py --samples samples/run_0400000_cfg1.0.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --reference data --save-stats data/reference.npz
    python evaluate.py --reconstruct --vae-ckpt pretrained/sdvae/sdvae.pt exps/e2e-vae/e2e-vae.pt --data-dir data

The first gives FID, sFID, Inception Score, precision and recall as ADM's suite defines them (docs/evaluation.md).
Several processes: `torchrun --nproc_per_node=8 evaluate.py ...`; the numbers are the same.
"""

from configs.arguments import evaluate_parser
from configs.parsing import flag_of

if __name__ == "__main__":  # --help and a mistyped flag answer before the heavy imports
    evaluate_parser().answer_before_imports()

import argparse
import logging
import re
import time
from pathlib import Path

import torch

from dataset.data import evenly_spaced
from dataset.image_arrays import RANGES, Range
from dataset.image_sources import Source, Subset, open_images, require_size
from evaluation.evaluator import NOTHING, compare, extract, require_neighbours, say, turn_notes
from evaluation.features import load_features
from evaluation.reconstruction import check_size, comparison_picture, measure_reconstruction
from evaluation.reference import read_reference, reference_images, save_reference
from loss.perceptual import load_lpips
from models.vae import load_vae
from utils.distributed import launcher_notes, main_first, rank, start_processes, world_size
from utils.errors import InputError, about, command
from utils.files import require_writable, write_json
from utils.images import save_png

SAMPLE_FLAGS = ("samples", "reference", "save_stats", "overwrite")
RECONSTRUCTION_FLAGS = ("vae_ckpt", "vae", "data_dir", "max_images", "num_picture", "lpips", "lpips_weights")


@command
def main(argv: list[str] | None = None) -> None:
    args = evaluate_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("timm").setLevel(logging.WARNING)
    processes = start_processes()
    if rank() == 0:
        for note in launcher_notes(mixed_precision=("no", "float32, in which features are measured,")):
            logging.warning(note)
    try:
        with main_first():
            check_flags(args)
            check_outputs(args)
        if args.reconstruct:
            evaluate_reconstruction(args, processes.device)
        else:
            evaluate_samples(args, processes.device)
    finally:
        processes.end_training()


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is read."""
    # A flag that nothing would read.
    for flag, given, fits in (
        ("--inception-weights", args.inception_weights, args.features == "inception"),
        ("--enc-ckpt", args.enc_ckpt, args.features not in ("inception", "none")),
    ):
        if given and not fits:
            raise InputError(f"{flag}: {given} was given, but --features {args.features} does not read it")
    default, rule = evaluate_parser().get_default, "does not go" if args.reconstruct else "goes"
    for name in SAMPLE_FLAGS if args.reconstruct else RECONSTRUCTION_FLAGS:
        if getattr(args, name) != default(name):
            flag = flag_of(name)
            raise InputError(f"{flag}: {getattr(args, name)} was given; it {rule} with --reconstruct")
    if args.lpips_weights and not args.lpips:
        raise InputError(f"--lpips-weights: {args.lpips_weights} was given, but --no-lpips does not read it")

    # What each mode needs.
    if args.reconstruct:
        if not args.vae_ckpt or len(args.vae_ckpt) > 2:
            raise InputError(f"--vae-ckpt: {len(args.vae_ckpt or [])} VAEs were given; --reconstruct needs one or two")
        if len(args.vae) not in (1, len(args.vae_ckpt)):
            raise InputError(f"--vae: {len(args.vae)} names were given; one, or one for each --vae-ckpt, is needed")
        return
    if not args.reference or not (args.samples or args.save_stats):
        raise InputError("--reference is needed, with --samples or --save-stats; or --reconstruct with --vae-ckpt")
    if args.features == "none":
        raise InputError("--features: 'none' was given; samples need a feature space")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the work what could not be written after it, or would replace what is read."""
    for flag, path, suffix in (("--output", args.output, ".json"), ("--save-stats", args.save_stats, ".npz")):
        if path is not None:
            if Path(path).suffix != suffix:
                raise InputError(f"{flag}: {path} was given; a name that ends with {suffix} is needed")
            require_writable(path, flag)
    if args.output is None and (measured := args.vae_ckpt[-1] if args.reconstruct else args.samples):
        require_writable(beside(measured, "numbers"), "--output")
    if args.save_stats and Path(args.save_stats).exists():
        if Path(args.save_stats).resolve() == Path(args.reference).resolve():
            raise InputError(f"--save-stats: {args.save_stats} is the --reference itself; another name is needed")
        if not args.overwrite:
            raise InputError(f"--save-stats: {args.save_stats} exists already; give another name or --overwrite")


# Samples


def evaluate_samples(args: argparse.Namespace, device: torch.device) -> None:
    start = time.perf_counter()
    with main_first():
        samples, size = open_samples(args)
        network = load_network(args, size).to(device)

    # The reference: read, or extracted and saved for the next time.
    with about("--reference"):
        options = {"batch_size": args.batch_size, "value_range": value_range(args)}
        reference = read_reference(args.reference, network, size, device, **options)
    if args.save_stats and rank() == 0:
        save_reference(args.save_stats, reference, network, size, device, source=args.reference)
        print(f"the statistics of {args.reference} are in {args.save_stats}")
    if samples is None:
        return

    # The samples against it.
    found = extract(samples, network, device, batch_size=args.batch_size, description="samples")
    results = compare(found, reference, network, device)

    if rank() == 0:
        output = Path(args.output or beside(args.samples, f"vs-{Path(args.reference).stem}-{network.label}"))
        about_run = {
            "samples": args.samples,
            "count": found.count,
            "size": list(size),
            "reference": args.reference,
            "reference_count": reference.count,
            "features": network.label,
            "batch_size": args.batch_size,
            "notes": [*found.notes, *reference.notes],
        }
        report({args.samples: results}, about_run, output, start)


def open_samples(args: argparse.Namespace) -> tuple[Source | None, tuple[int, int]]:
    """The samples (None without --samples) and the size that they and the reference must have."""
    samples = None
    if args.samples:
        with about("--samples"):
            samples = open_images(args.samples, value_range(args))
            require_neighbours(args.samples, len(samples))
    with about("--reference"):
        images = reference_images(args.reference, value_range(args))
    require_floats(args, samples, images)
    with about("--reference"):
        if samples is None:
            if images is None:
                raise InputError(f"{args.reference} has no images; --save-stats needs them")
            return None, images.size
        if images is not None:
            require_size(images, samples.size, f"{args.samples} has")
    return samples, samples.size


def value_range(args: argparse.Namespace) -> Range | None:
    return RANGES.get(args.samples_range)


def require_floats(args: argparse.Namespace, *sources: Source | None) -> None:
    """Refuse a range that no images have."""
    if args.samples_range and not any(source is not None and source.value_range for source in sources):
        raise InputError(f"--samples-range: {args.samples_range} was given, but no images are floats")


def load_network(args: argparse.Namespace, size: tuple[int, int]) -> torch.nn.Module | None:
    if args.features == "none":
        return None
    weights = args.inception_weights if args.features == "inception" else args.enc_ckpt
    return load_features(args.features, size, weights=weights)


# Reconstruction


def evaluate_reconstruction(args: argparse.Namespace, device: torch.device) -> None:
    start = time.perf_counter()
    with main_first():
        with about("--data-dir"):
            source = open_images(args.data_dir, value_range(args))
        require_floats(args, source)
        if args.max_images:
            source = Subset(source, evenly_spaced(len(source), args.max_images))
        vaes, notes = load_vaes(args, source)
        network = load_network(args, source.size)
        lpips = load_lpips(args.lpips_weights) if args.lpips else None
    for module in filter(None, (*vaes.values(), network, lpips)):
        module.to(device)

    # The originals' features once, then each VAE against them.
    originals = None
    if network is None:
        say(*source.notes)
        notes += source.notes
    else:
        originals = extract(source, network, device, batch_size=args.batch_size, keep=NOTHING, description="originals")
        notes += originals.notes
    results = {}
    for name, vae in vaes.items():
        with about("--vae-ckpt"):
            results[name] = measure_reconstruction(
                vae, source, device, batch_size=args.batch_size, network=network, originals=originals, lpips=lpips
            )
        if network is None and len(results) == 1:  # all images were read once
            notes += turn_notes(source)

    if rank() == 0:
        output = Path(args.output or beside(args.vae_ckpt[-1], "reconstruction"))
        about_run = {
            "vae_ckpt": args.vae_ckpt,
            "data_dir": args.data_dir,
            "count": len(source),
            "size": list(source.size),
            "features": args.features,
            "batch_size": args.batch_size,
            "notes": notes,
        }
        report(results, about_run, output, start)
        if args.num_picture:
            shown = Subset(source, evenly_spaced(len(source), args.num_picture))
            save_png(comparison_picture(shown.read(0, len(shown)).to(device), vaes), output.with_suffix(".png"))
            print(f"originals, reconstructions, differences and latents are in {output.with_suffix('.png')}")


def load_vaes(args: argparse.Namespace, source: Source) -> tuple[dict[str, torch.nn.Module], list[str]]:
    """VAEs by the name of their file, or by its path where two have one name; and what was chosen in loading them."""
    paths = [Path(path) for path in args.vae_ckpt]
    names = [path.stem for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"--vae-ckpt: {paths[0]} was given twice")
    architectures = args.vae * len(paths) if len(args.vae) == 1 else args.vae
    vaes, notes = {}, []
    for name, path, architecture in zip(names, paths, architectures, strict=True):
        vaes[name] = load_vae(architecture, path, say=notes.append).requires_grad_(False)
        with about("--data-dir"):
            check_size(vaes[name], source, lpips=args.lpips)
    for note in notes if rank() == 0 else ():
        logging.getLogger(__name__).warning(note)
    return vaes, notes


# Output


def beside(path: str, what: str) -> Path:
    """`<path without suffix>-<what>.json` next to a file or folder; here, for a name that is neither."""
    path = Path(path)
    folder = path.parent if path.exists() else Path()
    stem = path.stem if path.is_file() else path.name
    return folder / f"{stem}-{re.sub(r'[^A-Za-z0-9._-]+', '_', what)}.json"


def report(results: dict[str, dict[str, float]], about_run: dict, output: Path, start: float) -> None:
    """Print the numbers of each subject, and write them as JSON."""
    seconds = time.perf_counter() - start
    values = next(iter(results.values())) if len(results) == 1 else {"results": results}
    machine = {"processes": world_size(), "seconds": seconds, "torch": str(torch.__version__)}
    write_json(output, values | about_run | machine)
    for subject, numbers in results.items():
        print(f"{subject} ({about_run['count']} images)")
        for name, value in numbers.items():
            print(f"  {name:<32} {value:.6g}")
    print(f"written to {output} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
