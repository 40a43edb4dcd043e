"""Step time from 1 to 64 GPUs by a small model, and the model against one and two processes on this machine's CPU.

    python -m benchmarks.scaling

A step on N devices takes what it takes on one, and of each network's all-reduce what its backward pass does not hide:

    t(N) = t(1) + sum over networks of max(0, all-reduce - overlap * backward)
    all-reduce = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency    (a ring)

Within a node of 8 the links are NVLink; beyond it the slowest link of the ring counts, here one 400 Gb/s adapter a
node. Rates of one GPU and bandwidths are assumed until a card has been measured; gradients are
counted from the networks.
"""

import os
import socket
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


# The model against this machine


def network() -> nn.Module:
    return SiT_models["SiT-T/2"](input_size=8, in_channels=4, encoder_depth=2, z_dims=[32])


def measure(rank: int, world: int, port: int, images: int, found) -> None:
    """Seconds of a step, and of an all-reduce of its gradients, in the median; by rank 0 into `found`."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    sit = network()
    ddp = DistributedDataParallel(sit)
    x, t, y = torch.randn(images, 4, 8, 8), torch.rand(images), torch.zeros(images, dtype=torch.int64)

    def step():
        velocity, projections = ddp(x, t, y)
        (velocity.square().mean() + projections[0].square().mean()).backward()

    gradients = torch.zeros(sum(parameter.numel() for parameter in sit.parameters() if parameter.requires_grad))
    steps, reduces = (median(call) for call in (step, lambda: dist.all_reduce(gradients)))
    if rank == 0:
        found.update(step=steps, reduce=reduces, bytes=4 * gradients.numel())
    dist.destroy_process_group()


def median(call, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[len(times[3:]) // 2]


def started(world: int, images: int) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(measure, (world, port, images, found), nprocs=world)
        return dict(found)


def checked(images: int) -> dict:
    """Two processes as predicted from one, and as they are; gloo works on the same core: nothing overlaps."""
    one, two = started(1, images), started(2, images)
    predicted = one["step"] + two["reduce"]
    return {
        "images_each": images,
        "one_process_ms": 1000 * one["step"],
        "all_reduce_ms": 1000 * two["reduce"],
        "predicted_ms": 1000 * predicted,
        "two_processes_ms": 1000 * two["step"],
        "error": predicted / two["step"] - 1,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(arguments(__doc__), argv)
    report(args, "scaling", [row for job in jobs() for row in rows_of(job)], ["rates and bandwidths are assumed"])
    report(args, "scaling-check", [checked(images) for images in (2, 16)])


if __name__ == "__main__":
    main()
