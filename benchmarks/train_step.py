"""Speed and memory of a training step, and where its time goes, part by part, through the scripts' own `train_step`.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --cases repae-f8d4 --precision bf16 -- --tune-convolutions --grad-checkpoint vae

What stands behind `--` goes to the training script. Weights and images are random; every case is a process of its own.
Rate and memory are those of steps that nothing waits for, as in training; the parts are timed in steps of their own, by
CUDA events, on a CPU by processor time. The MFU's FLOPs are those that `--dry-run` counts; its 100 % is the peak of the
data sheet, and beside it stands the share of a matrix product that was measured in the same process.
"""

import argparse
import itertools
import multiprocessing
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import train_ldm_only
import train_repae
from benchmarks.common import arguments, card_name, matmul_flops, parse, peak_gib, report, synchronize
from configs.arguments import ldm_only_parser, repae_parser
from loss.config import read_loss_config
from loss.perceptual import lpips_by_shape
from loss.vae import VAELoss
from models.discriminator import PatchDiscriminator
from models.encoders import encoders_by_shape
from models.vae import build_vae, latent_shape
from training.parts import step_parts
from training.run import Run
from utils.cards import peak_flops
from utils.parts import Part, Parts

# Name: script, and its options at real size and at a CPU's.
SIZES = {
    "repae-f8d4": ("repae", dict(vae="f8d4", model="SiT-XL/2"), dict(model="SiT-S/2", resolution=64)),
    "repae-f16d32": ("repae", dict(vae="f16d32", model="SiT-XL/1"), dict(model="SiT-S/1", resolution=64)),
    "ldm-f8d4": ("ldm", dict(vae="f8d4", model="SiT-XL/2"), dict(model="SiT-S/2", resolution=64)),
    "ldm-f16d32": ("ldm", dict(vae="f16d32", model="SiT-XL/1"), dict(model="SiT-S/1", resolution=64)),
}
BATCH = {"cuda": 32, "cpu": 4}  # of one process: 32 on each of 8 is the paper's 256
STEPS = {"cuda": (10, 50, 5), "cpu": (1, 3, 2)}  # to warm up, to measure, and to time by part
COUNT = 2048  # images of the data set


class Synthetic:
    """A data set of random rows of these shapes and dtypes, drawn once."""

    def __init__(self, *rows: tuple[tuple[int, ...], torch.dtype]):
        few = 64  # that repeat: the bytes are read as they would be
        self.tensors = [
            torch.randint(256, (few, *shape), dtype=dtype)
            if dtype == torch.uint8
            else torch.randn(few, *shape).to(dtype)
            for shape, dtype in rows
        ]

    def __len__(self) -> int:
        return COUNT

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        labels = torch.tensor(indices) % 1000
        return *(tensor[torch.tensor(indices) % len(tensor)] for tensor in self.tensors), labels


def options(
    case: str, device: torch.device, *, small: bool, precision: str, compiled: bool, more: list[str]
) -> list[str]:
    """The command line of the case's script."""
    _, real, few = SIZES[case]
    flags = real | (few if small else {}) | dict(mixed_precision=precision, batch_size=BATCH[device.type])
    flags |= dict(exp_name=case, enc_type="dinov2-vit-b", num_classes=1000, report_to="none", num_workers=4 - 4 * small)
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [*words, "--compile" if compiled else "--no-compile", *more]


def with_random_weights(module: nn.Module) -> nn.Module:
    """A network of the meta device, on the CPU; small weights, so that nothing overflows in half precision."""
    module.to_empty(device="cpu")
    for tensor in module.parameters():
        nn.init.normal_(tensor, std=0.02) if tensor.dim() > 1 else nn.init.ones_(tensor)
    for tensor in module.buffers():
        tensor.fill_(1)  # means and deviations of pixels among them
    return module


def build(script: str, args: argparse.Namespace, run: Run) -> tuple[object, object, Synthetic]:
    """Networks with random weights, where the run's device is, and the data that the script reads."""
    with torch.device("meta"):
        encoders = encoders_by_shape(args.enc_type, args.resolution)
    encoders, vae = [with_random_weights(encoder) for encoder in encoders], build_vae(args.vae)
    image = ((3, args.resolution, args.resolution), torch.uint8)
    if script == "ldm":
        shape = latent_shape(vae, args.resolution)
        nets = train_ldm_only.assemble(args, run, encoders, vae, shape)
        return nets, Synthetic(((2 * shape[0], *shape[1:]), torch.float32), image)
    loss = VAELoss(read_loss_config(args.loss_cfg_path), with_random_weights(lpips_by_shape()))
    return train_repae.assemble(args, run, encoders, vae, PatchDiscriminator(), loss), Synthetic(image)


def prepare(script: str, words: list[str]) -> tuple[Run, Callable[[int], dict], Callable[[Parts], object]]:
    """The run, a step of it by its number, and what makes its parts known."""
    module, parser = (train_ldm_only, ldm_only_parser()) if script == "ldm" else (train_repae, repae_parser())
    args = parser.parse_args(words)
    run = Run(args)
    nets, data = build(script, args, run)
    run.to_device(nets.sit, nets.ema, *nets.encoders)
    if script == "ldm":
        nets.sit_ddp = run.wrap(nets.sit.train())
        optimizers = module.build_optimizer(args, run, nets, None)
        parted = dict(optimizers=[optimizers], encoders=nets.encoders, sit=nets.sit)
    else:
        run.to_device(nets.vae, nets.discriminator, nets.vae_loss.lpips, nets.discriminator_loss)
        if args.tune_convolutions:
            run.tune_convolutions(nets.vae, nets.discriminator, nets.vae_loss.lpips)
        optimizers = module.build_optimizers(args, run, nets, None)
        nets.sit_ddp, nets.vae_ddp = run.wrap(nets.sit.train()), run.wrap(nets.vae.train())
        nets.discriminator_ddp = run.wrap(nets.discriminator.train())
        networks = dict(vae=nets.vae, lpips=nets.vae_loss.lpips, discriminator=nets.discriminator)
        parted = dict(optimizers=vars(optimizers).values(), encoders=nets.encoders, sit=nets.sit, **networks)
    if args.compile:
        module.compile_networks(nets)
    loader, settings = run.batches(data), module.step_settings(args, micro_steps=1)

    def step(number: int) -> dict:
        return module.train_step(run, nets, optimizers, loader, number, **settings)

    return run, step, lambda parts: step_parts(parts, **parted)


class Stopwatch:
    """Seconds by part: of the device between CUDA events, or of the processor."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self, part: Part) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.process_time()
        self.marks.append((part, event))

    def seconds(self) -> dict[Part, float]:
        synchronize(self.device)
        total = defaultdict(float)
        for (part, begin), (_, end) in itertools.pairwise(self.marks):
            total[part] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return total


def measure(case: str, words: list[str], device: torch.device, threads: int) -> tuple[dict, list[dict]]:
    """A row of the whole step, and rows of its parts."""
    torch.set_num_threads(threads)
    torch.compiler.config.force_disable_caches = True  # the first step is that of a machine that has seen nothing
    script = SIZES[case][0]
    plan = (train_ldm_only if script == "ldm" else train_repae).planned(
        (ldm_only_parser() if script == "ldm" else repae_parser()).parse_args(words)
    )
    run, step, parts_of = prepare(script, words)
    half = run.autocast_dtype is not None
    product = matmul_flops(device, run.autocast_dtype or torch.float32)
    sheet = peak_flops(card_name(device), half=half, tf32=run.args.allow_tf32)

    # The first step, some that warm up, and those that count.
    warm, counted, timed = STEPS[device.type]
    first = elapsed(device, lambda: step(0))
    for number in range(warm):
        step(1 + number)
    run._window.waited = 0.0
    spent = elapsed(device, lambda: [step(1 + warm + number) for number in range(counted)])
    rate = counted * run.args.batch_size / spent
    whole = {
        "case": case,
        "precision": run.args.mixed_precision,
        "compiled": run.args.compile,
        "images": run.args.batch_size,
        "images_per_second": rate,
        "mfu": sheet and rate * plan.flops_per_image / sheet,
        "share_of_product": rate * plan.flops_per_image / product,
        "peak_gib": peak_gib(device),
        "planned_gib": sum(plan.peak.values()) / 2**30,
        "first_step_s": first,
        "data_wait_share": run._window.waited / spent,
    }

    # Steps by part.
    watch = Stopwatch(device)
    parts = Parts(watch.mark)
    with parts_of(parts):
        watch.mark(parts.running)
        for number in range(timed):
            step(1 + warm + counted + number)
        watch.mark(parts.running)
    return whole, part_rows(case, watch.seconds(), plan.flops, timed, run.args.batch_size, product)


def part_rows(
    case: str, seconds: dict[Part, float], flops: dict[Part, float], steps: int, images: int, product: float
) -> list[dict]:
    total, rows = sum(seconds.values()), []
    for part in sorted(seconds, key=seconds.get, reverse=True):
        of_step = seconds[part] / steps
        rows.append(
            {
                "case": case,
                "part": part.name + (" backward" if part.backward else ""),
                "ms_of_a_step": 1000 * of_step,
                "share": seconds[part] / total,
                "gflop_an_image": flops.get(part, 0) / 1e9,
                "share_of_product": flops.get(part, 0) * images / of_step / product,
            }
        )
    return rows


def elapsed(device: torch.device, call: Callable[[], object]) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    for case in args.cases.split(","):
        for precision in args.precision.split(","):
            for compiled in args.compile.split(","):
                yield case, precision, compiled == "yes"


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", help=f"comma list of {', '.join(SIZES)} (default: all; on a CPU of f8d4)")
    parser.add_argument("--precision", help="comma list of no, fp16, bf16 (default: fp16,bf16; on a CPU no)")
    parser.add_argument("--compile", help="comma list of yes, no (default: both; on a CPU no)")
    parser.add_argument("more", nargs="*", metavar="-- FLAGS", help="of the training script")
    args = parse(parser, argv)
    on_cpu = args.device.type == "cpu"
    args.cases = args.cases or ("repae-f8d4,ldm-f8d4" if on_cpu else ",".join(SIZES))
    args.precision = args.precision or ("no" if on_cpu else "fp16,bf16")
    args.compile = args.compile or ("no" if on_cpu else "yes,no")

    wholes, by_part = [], []
    for case, precision, compiled in cases(args):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            size = dict(small=args.small, precision=precision, compiled=compiled)
            words = [*options(case, args.device, more=args.more, **size), "--output-dir", folder]
            whole, rows = pool.apply(measure, (case, words, args.device, args.threads))
        wholes.append(whole)
        by_part += [{"precision": precision, "compiled": compiled, **row} for row in rows]
    more = re.sub(r"\W+", "-", " ".join(args.more)).strip("-")
    notes = ["a CPU's convolutions are faster than its matrix product: shares of it pass 1"] if on_cpu else []
    report(args, "train-step" + (f"-{more}" if more else ""), wholes, notes)
    report(args, "train-step-parts" + (f"-{more}" if more else ""), by_part, notes)


if __name__ == "__main__":
    main()
