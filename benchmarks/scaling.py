"""Step time from 1 to 64 GPUs by a small model, from counted FLOPs and gradients; nothing is measured here.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rate repae-f8d4=60 --adapters 8

A step on N devices takes what it takes on one, and of each network's all-reduce what its backward pass does not hide.
DistributedDataParallel averages gradients in buckets, one after the other, each as soon as it is full. Let n equal
buckets fill at even times of a backward pass of B seconds, and let one take r seconds to average. The last one begins
when the backward pass ends; where they do not keep up, all of them wait in line behind the first:

    exposed = max(r, n r - (1 - 1/n) B)
    r = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency of a hop                (a ring)

Gradients, and the share of a step that each network's buckets have to hide behind, are those of `--dry-run`. Rates,
bandwidths and latencies are assumptions, and options. `benchmarks.scaling_check` holds the formula against processes.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ldm_only
import train_repae
from benchmarks.common import arguments, parse, report
from benchmarks.train_step import SIZES, options
from configs.arguments import ldm_only_parser, repae_parser
from utils.parts import Part

GPUS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8  # GPUs that NVLink joins
BATCH, PUBLIC_BATCH = 32, 256  # images of a GPU; of all of them in the public runs
BUCKET = 25 * 2**20  # bytes: DistributedDataParallel's default, which `Run.wrap` leaves

# Images a second of one H100: published for LDM-only with alignment and for REPA-E, and this repository's goals.
RATES = ["ldm-f8d4=173", "ldm-f8d4=585", "repae-f8d4=34", "repae-f8d4=91", "repae-f16d32=153"]

# The backward passes that go on while a network's buckets fill. The discriminator's gradients are less than one bucket.
HIDES = {"SiT": ["SiT step"], "VAE": ["VAE decode", "VAE encode"], "discriminator": []}


@dataclass(frozen=True)
class Link:
    """What joins the devices of a ring.

    Attributes:
        bandwidth: bytes a second that an all-reduce gets out of its slowest link.
        latency: seconds of all hops of one all-reduce together.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Job:
    """What scales: the step of one device, and the gradients that its devices average.

    Attributes:
        rate: images a second of one device.
        networks: name: (bytes of gradients, share of the step that its buckets have to hide behind).
    """

    name: str
    rate: float
    networks: dict[str, tuple[float, float]]

    def seconds(self, images: int, devices: int, link: Link) -> float:
        """Of a step of `images` on each of so many devices."""
        alone = images / self.rate
        if devices == 1:
            return alone
        networks = self.networks.values()
        return alone + sum(exposed_seconds(size, share * alone, devices, link) for size, share in networks)


def all_reduce_seconds(size: float, devices: int, link: Link) -> float:
    return 2 * (devices - 1) / devices * size / link.bandwidth + link.latency


def exposed_seconds(size: float, backward: float, devices: int, link: Link) -> float:
    """Seconds that averaging `size` bytes of gradients outlasts a backward pass of so many seconds."""
    buckets = math.ceil(size / BUCKET)
    one = all_reduce_seconds(size / buckets, devices, link)
    return max(one, buckets * one - (1 - 1 / buckets) * backward)


def link_between(devices: int, args: argparse.Namespace) -> Link:
    """NVLink within a node; beyond it the node's network adapters, unless NVLink is slower than all of them."""
    nodes = math.ceil(devices / NODE)
    bandwidth = args.nvlink if nodes == 1 else min(args.nvlink, args.adapters * args.adapter)
    hops, between_nodes = 2 * (devices - 1), 2 * (nodes - 1)
    microseconds = (hops - between_nodes) * args.nvlink_hop + between_nodes * args.network_hop
    return Link(bandwidth * 1e9, microseconds * 1e-6)


def networks_of(case: str) -> dict[str, tuple[float, float]]:
    """Of a case of `benchmarks.train_step` at real size: gradients and shares of FLOPs, as `Job` takes them."""
    script = SIZES[case][0]
    module, parser = (train_ldm_only, ldm_only_parser()) if script == "ldm" else (train_repae, repae_parser())
    words = options(case, torch.device("cuda"), small=False, precision="bf16", compiled=False, more=[])
    plan = module.planned(parser.parse_args(words))
    networks = {}
    for name, network in plan.networks.items():
        size = sum(4 * parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        if size:
            hiding = sum(plan.flops[Part(part, backward=True)] for part in HIDES[name])
            networks[name] = (size, hiding / plan.flops_per_image)
    return networks


def rows_of(job: Job, args: argparse.Namespace) -> list[dict]:
    """Weak scaling with 32 images on each device, and strong scaling of 256 images in all."""
    rows = []
    for devices in GPUS:
        link = link_between(devices, args)
        row = {"case": job.name, "rate_of_one": job.rate, "gpus": devices}
        for name, images in (("32_each", BATCH), ("256_in_all", PUBLIC_BATCH // devices)):
            seconds = job.seconds(images, devices, link)
            row |= {f"images_per_second_{name}": devices * images / seconds}
            row |= {f"efficiency_{name}": images / job.rate / seconds}
        rows.append(row)
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """Images a second against GPUs, 32 on each; dashed what N times one would be."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for (case, rate), job in itertools.groupby(rows, key=lambda row: (row["case"], row["rate_of_one"])):
        rates = [row["images_per_second_32_each"] for row in job]
        (line,) = ax.loglog(GPUS, rates, "o-", label=f"{case}, {rate:g} each")
        ax.loglog(GPUS, [rate * devices for devices in GPUS], "--", color=line.get_color(), alpha=0.5)
    ax.axvline(NODE, color="grey", linewidth=0.8)
    ax.set_xticks(GPUS, [str(devices) for devices in GPUS])
    ax.minorticks_off()
    ax.set_xlabel("GPUs, 8 to a node; by the model, not measured")
    ax.set_ylabel("images a second")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling"}):  # the same bytes for the same rows
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


def rate_of(text: str) -> tuple[str, float]:
    case, _, rate = text.partition("=")
    if case not in SIZES or not float(rate) > 0:
        raise argparse.ArgumentTypeError(f"{text}: CASE=IMAGES_PER_SECOND, of {', '.join(SIZES)}")
    return case, float(rate)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    add, rates = parser.add_argument, ", ".join(RATES)
    add("--rate", type=rate_of, action="append", help=f"CASE=IMAGES_PER_SECOND of one GPU (default: {rates})")
    add("--nvlink", type=float, default=200, help="GB/s of an all-reduce within a node; default: %(default)s")
    add("--adapter", type=float, default=40, help="GB/s out of one network adapter of 400 Gb/s; default: %(default)s")
    add("--adapters", type=int, default=1, help="of a node; default: %(default)s")
    add("--nvlink-hop", type=float, default=3.4, help="microseconds; default: %(default)s")
    add("--network-hop", type=float, default=9.6, help="microseconds; default: %(default)s")
    add("--picture", type=Path, help="file of an SVG of images a second against GPUs")
    args = parse(parser, argv)
    args.rate = args.rate or [rate_of(text) for text in RATES]
    networks = {case: networks_of(case) for case in dict(args.rate)}
    rows = [row for case, rate in args.rate for row in rows_of(Job(case, rate, networks[case]), args)]
    notes = [
        f"{case}, {name}: {size / 1e9:.2f} GB in {math.ceil(size / BUCKET)} buckets, behind {share:.0%} of a step"
        for case in networks
        for name, (size, share) in networks[case].items()
    ]
    report(args, "scaling", rows, [*notes, "rates, bandwidths and latencies are assumed, not measured"])
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
