"""Step time from 1 to 64 GPUs by a small model; nothing is measured.

    python -m benchmarks.scaling

A step on N devices takes what it takes on one, and of each network's all-reduce what its backward pass does not hide:

    t(N) = t(1) + sum over networks of max(0, all-reduce - overlap * backward)
    all-reduce = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency    (a ring)

Within a node of 8 the links are NVLink; beyond it the slowest link of the ring counts, here one 400 Gb/s adapter a
node. Rates of one GPU and bandwidths are assumed until a card has been measured; gradients are
counted from the networks.
"""

from dataclasses import dataclass

import torch

from benchmarks.common import arguments, parse, report
from models.discriminator import PatchDiscriminator
from models.sit import SiT_models
from models.vae import build_vae

GPUS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8
# Bytes a second that an all-reduce gets out of a link, and seconds of a hop: assumed, not measured.
NVLINK, NETWORK, HOP = 200e9, 40e9, 5e-6
OVERLAP = 0.8  # of a backward pass: the last bucket has nothing to hide behind
BACKWARD = 0.6  # of a step, by the FLOPs that --dry-run counts


@dataclass(frozen=True)
class Job:
    """What scales: the step of one device, and the gradients that its devices average.

    Attributes:
        rate: images a second of one device.
        networks: name: (bytes of gradients, share of the step's backward work).
    """

    name: str
    rate: float
    networks: dict[str, tuple[float, float]]

    def seconds(
        self, devices: int, images: int, *, bandwidth: float, latency: float, overlap: float = OVERLAP
    ) -> float:
        """Of a step of `images` on each of so many devices."""
        alone = images / self.rate
        exposed = 0.0
        for size, share in self.networks.values():
            reduce = all_reduce_seconds(size, devices, bandwidth, latency)
            exposed += max(0.0, reduce - overlap * share * BACKWARD * alone)
        return alone + exposed


def all_reduce_seconds(size: float, devices: int, bandwidth: float, latency: float) -> float:
    return 2 * (devices - 1) / devices * size / bandwidth + 2 * (devices - 1) * latency


def gradient_bytes(build) -> int:
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in build().parameters())


def jobs() -> list[Job]:
    """LDM-only and REPA-E (f8d4) at published rates of one H100, and at this repository's goals."""
    sit, vae = gradient_bytes(SiT_models["SiT-XL/2"]), gradient_bytes(lambda: build_vae("f8d4"))
    discriminator = gradient_bytes(PatchDiscriminator)
    ldm = {"SiT": (sit, 1.0)}
    repae = {"SiT": (sit, 0.2), "VAE": (vae, 0.78), "discriminator": (discriminator, 0.02)}
    return [
        Job("LDM, 173 images/s (published)", 173, ldm),
        Job("LDM, 585 images/s (goal)", 585, ldm),
        Job("REPA-E f8d4, 34 images/s (published)", 34, repae),
        Job("REPA-E f8d4, 91 images/s (goal)", 91, repae),
    ]


def rows_of(job: Job) -> list[dict]:
    """Weak scaling with 32 images on each device, and strong scaling of 256 images in all."""
    rows = []
    for devices in GPUS:
        link = dict(bandwidth=NVLINK if devices <= NODE else NETWORK, latency=HOP)
        weak = job.seconds(devices, 32, **link)
        share = 256 // devices
        strong = job.seconds(devices, share, **link)
        rows.append(
            {
                "job": job.name,
                "gpus": devices,
                "images_per_second_32_each": devices * 32 / weak,
                "efficiency_32_each": 32 / job.rate / weak,
                "images_per_second_256_in_all": devices * share / strong,
                "efficiency_256_in_all": share / job.rate / strong,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(arguments(__doc__), argv)
    report(args, "scaling", [row for job in jobs() for row in rows_of(job)], ["rates and bandwidths are assumed"])


if __name__ == "__main__":
    main()
