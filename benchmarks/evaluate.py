"""How fast images are evaluated: Inception as published and as we run it, features end to end, reconstruction, metrics.

    python -m benchmarks.evaluate

Weights are random. `share_of_matmul` is a network's rate of FLOPs against that of a matrix product, in float32 without
TF32 like all of evaluation, measured in the same run. `python -m benchmarks.metrics` has all metrics, at full size.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.common import Seconds, arguments, fastest, forget_peak, matmul_flops, parse, peak_gib, report
from benchmarks.metrics import fid, neighbours
from dataset.image_sources import ImageArray
from evaluation.evaluator import extract
from evaluation.features import exact_float32
from evaluation.inception import Inception, fold_batch_norms, load_inception
from evaluation.metrics import ssim
from evaluation.reconstruction import measure_reconstruction
from loss.perceptual import load_lpips
from models.vae import build_vae, vae_models
from tests.support.evaluation_data import inception_file
from tests.support.golden_data import filled_vgg16

SIDE = 256  # of the images that the networks see


class Case(NamedTuple):
    """A call to time, and how many images it takes, of which side (None: it takes features)."""

    call: Callable
    images: int
    side: int | None
    is_network: bool = True  # whose FLOPs are nearly all of its work


def random_images(count: int, side: int) -> torch.Tensor:
    """uint8 (count, 3, side, side)."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def as_source(images: torch.Tensor) -> ImageArray:
    return ImageArray(images.numpy(), "random images", channels_last=False)


def inception_cases(args: argparse.Namespace, file: Path, ours: Inception) -> dict[str, Case]:
    """Inception as torch-fidelity has it, and what we made of it step by step."""
    published = FeatureExtractorInceptionV3("published", ["2048"], feature_extractor_weights_path=str(file))
    networks = {
        "Inception as published": published,
        "Inception folded": fold_batch_norms(copy.deepcopy(published)),
        "Inception folded, channels_last": copy.deepcopy(ours).to(memory_format=torch.channels_last),
        "Inception in use": ours,
    }
    images = random_images(args.batch_size, SIDE).to(args.device)
    return {
        name: Case(partial(network.to(args.device), images), len(images), SIDE) for name, network in networks.items()
    }


def reconstruction_cases(args: argparse.Namespace, lpips: torch.nn.Module) -> dict[str, Case]:
    """What a reconstruction is measured by, and the whole pass with a VAE."""
    count, side = (2, 64) if args.small else (args.batch_size, SIDE)
    images = random_images(count, SIDE).to(args.device)
    x, y = images / 255, images.flip(0) / 255
    source, vae = as_source(random_images(count, side)), build_vae(vae_models["f8d4"]).eval().to(args.device)
    measure = partial(measure_reconstruction, vae, source, args.device, batch_size=count, lpips=lpips)
    return {
        "LPIPS": Case(partial(lpips, 2 * x - 1, 2 * y - 1), count, SIDE),
        "SSIM": Case(partial(ssim, x, y), count, SIDE, is_network=False),
        "f8d4 reconstruction, PSNR, SSIM, LPIPS": Case(measure, count, side),
    }


def feature_cases(args: argparse.Namespace, ours: Inception) -> dict[str, Case]:
    """Images in, moments of their features out; and what is made of features, which is a CPU's work here."""
    source, features = as_source(random_images(3 * args.batch_size, SIDE)), 3000 if args.small else 10000
    measure = partial(extract, source, ours, args.device, batch_size=args.batch_size)
    return {
        "images to moments, Inception in use": Case(measure, len(source), SIDE),
        "FID of features": Case(fid(features), features, None, is_network=False),
        "precision, recall of features, as ADM": Case(neighbours(features, True), features, None, is_network=False),
    }


def row(name: str, case: Case, spent: Seconds, args: argparse.Namespace, peak_flops: float) -> dict:
    """One more call counts its FLOPs (convolutions and products) and its memory."""
    forget_peak(args.device)
    with FlopCounterMode(display=False) as counter:
        case.call()
    share = counter.get_total_flops() / spent.best(args.device) / peak_flops if case.is_network else None
    return {
        "what": name,
        "images": case.images,
        "side": case.side,
        "images_per_second": case.images / spent.wall,
        "images_per_core_second": case.images / spent.processor if args.device.type == "cpu" else None,
        "share_of_matmul": share,
        "peak_gib": peak_gib(args.device),
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, help="of the networks (default: 64, as evaluate.py; small: 8)")
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts; default: %(default)s")
    args = parse(parser, argv)
    args.batch_size = args.batch_size or (8 if args.small else 64)

    with tempfile.TemporaryDirectory() as folder, exact_float32(args.device):
        file, vgg_file = inception_file(Path(folder)), Path(folder, "vgg16.pth")
        torch.save(filled_vgg16(), vgg_file)
        ours, lpips = load_inception(file).to(args.device), load_lpips(vgg_file).to(args.device)
        cases = inception_cases(args, file, ours) | feature_cases(args, ours) | reconstruction_cases(args, lpips)
        peak_flops = matmul_flops(args.device, torch.float32)
        spent = fastest({name: case.call for name, case in cases.items()}, args.device, repeats=args.repeats)
        rows = [row(name, case, spent[name], args, peak_flops) for name, case in cases.items()]
    product = f"a matrix product: {peak_flops / 1e12:.3g} TFLOP/s"
    report(args, "evaluate", rows, [f"{product}; convolutions come above it where their library knows the CPU better"])


if __name__ == "__main__":
    main()
