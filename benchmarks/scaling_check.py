"""The formula of `benchmarks.scaling` held against two processes of this machine, one core each (Linux).

    python -m benchmarks.scaling_check

A step of SiT under DistributedDataParallel, in rounds of five kinds, so that all meet the same load:

- one process, the other waiting;
- two, whose buckets of gradients are filled and not sent: what a neighbour costs;
- two, averaged by gloo, whose all-reduce of a bucket and of a number is timed in the same rounds. It is the cores' own
  work, so that nothing hides it: the formula with a backward pass of no length;
- two, over a link that takes time and no core, as a network adapter does: every bucket waits as long as it would
  travel, one after the other. A fast link, which a backward pass hides but for the last bucket, and a slow one.

The prediction is the median step of the second kind plus the formula's exposed seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import arguments, parse, report
from benchmarks.scaling import BUCKET, Link, all_reduce_seconds, exposed_seconds
from models.sit import SiT_models

SIDE, CHANNELS = 16, 4  # of the latents
# Seconds that a link takes for all gradients, in backward passes, by its name.
LINKS = {"two, fast link": 0.5, "two, slow link": 1.5}
NOWHERE = Link(bandwidth=float("inf"), latency=0.0)
TIMEOUT = 300  # seconds, of the whole job


class Carrier:
    """How buckets of gradients are averaged: over gloo, or over a link that only takes time."""

    def __init__(self):
        self.link: Link | None = None  # gloo
        self.sizes = []  # bytes of the buckets that were carried
        self.queue = ThreadPoolExecutor(1)


def carry(carrier: Carrier, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DistributedDataParallel."""
    gradients, processes = bucket.buffer(), dist.get_world_size()
    carrier.sizes.append(gradients.nbytes)
    if carrier.link is None:
        work = dist.all_reduce(gradients.div_(processes), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    future, seconds = torch.futures.Future(), all_reduce_seconds(gradients.nbytes, processes, carrier.link)

    def travel():
        time.sleep(seconds)
        future.set_result(gradients)

    travel() if seconds == 0 else carrier.queue.submit(travel)
    return future


class Trainer:
    """SiT, its optimiser, and one batch that repeats."""

    def __init__(self, model: str, images: int):
        torch.manual_seed(0)
        self.carrier = Carrier()
        sit = SiT_models[model](input_size=SIDE, in_channels=CHANNELS, encoder_depth=1, z_dims=())
        self.sit = DistributedDataParallel(sit, broadcast_buffers=False, gradient_as_bucket_view=True)  # as `Run.wrap`
        self.sit.register_comm_hook(self.carrier, carry)
        self.optimizer = torch.optim.AdamW(sit.parameters(), lr=1e-4)
        self.x_t, self.velocity = torch.randn(2, images, CHANNELS, SIDE, SIDE)
        self.t, self.labels = torch.rand(images), torch.arange(images)
        self.gradient_bytes = sum(4 * parameter.numel() for parameter in sit.parameters() if parameter.requires_grad)

    def step(self, link: Link | None = None, *, average: bool = True) -> tuple[float, float]:
        """Seconds of a step, and of its backward pass."""
        self.carrier.link, self.sit.require_backward_grad_sync = link, average  # the latter as within `no_sync`
        self.carrier.sizes.clear()
        began = time.perf_counter()
        loss = F.mse_loss(self.sit(self.x_t, self.t, self.labels)[0], self.velocity)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, backward - forward


def gloo_seconds(size: int) -> float:
    """Of one all-reduce of so many bytes."""
    tensor = torch.zeros(size // 4)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(tensor)
    return time.perf_counter() - began


def links_for(trainer: Trainer) -> dict[str, Link]:
    """The links of `LINKS`, a tenth of whose time is latency, for the backward pass that rank 0 measures."""
    backward = torch.tensor(statistics.median(trainer.step(NOWHERE)[1] for _ in range(3)))
    dist.broadcast(backward, src=0)
    links = {}
    for name, passes in LINKS.items():
        seconds = passes * backward.item()
        links[name] = Link(trainer.gradient_bytes / (0.9 * seconds), 0.1 * seconds / len(trainer.carrier.sizes))
    return links


def work(args: argparse.Namespace) -> None:
    """One of the two processes; rank 0 writes the seconds of every round, by kind, and what they were of."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo")
    trainer, seconds = Trainer(args.model, args.batch_size), defaultdict(list)
    for _ in range(3):  # the second step makes the buckets anew, in the order in which gradients come
        trainer.step()
    kinds = list({"two, not averaged": NOWHERE, "two, gloo": None, **links_for(trainer)}.items())

    for _ in range(args.rounds):
        if rank == 0:
            seconds["one process"].append(trainer.step(average=False)[0])
        seconds["a number"].append(gloo_seconds(4))
        seconds["a bucket"].append(gloo_seconds(BUCKET))
        kinds.reverse()  # so that none always comes after the same one
        for name, link in kinds:
            dist.barrier()
            step, backward = trainer.step(link)
            seconds[name].append(step)
            if link is NOWHERE:
                seconds["backward"].append(backward)

    if rank == 0:
        median = {kind: statistics.median(rounds) for kind, rounds in seconds.items()}
        links = {name: vars(link) for name, link in kinds if name in LINKS}
        sizes = {"gradient_bytes": trainer.gradient_bytes, "buckets": trainer.carrier.sizes}
        args.worker.write_text(json.dumps({"median": median, "links": links, **sizes}))
    dist.destroy_process_group()


def rows_of(measured: dict) -> list[dict]:
    """Medians, and what the formula makes of them: of a step, and of the averaging in it."""
    median, size = measured["median"], measured["gradient_bytes"]
    alone = median["two, not averaged"]
    gloo = Link(BUCKET / (median["a bucket"] - median["a number"]), median["a number"])
    exposed = {"two, gloo": exposed_seconds(size, 0.0, 2, gloo)}
    for name, link in measured["links"].items():
        exposed[name] = exposed_seconds(size, median["backward"], 2, Link(**link))
    rows = []
    for kind in ("one process", "two, not averaged", *exposed):
        row = {"step": kind, "measured_s": median[kind], "predicted_s": None, "error": None}
        row |= {"measured_exposed_s": None, "predicted_exposed_s": None}
        if kind in exposed:
            predicted = alone + exposed[kind]
            row |= {"predicted_s": predicted, "error": predicted / median[kind] - 1}
            row |= {"measured_exposed_s": median[kind] - alone, "predicted_exposed_s": exposed[kind]}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="SiT-S/2", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=2, help="images of each process; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # where one of the two processes writes
    parser.set_defaults(threads=1)
    args = parse(parser, argv)
    if args.worker:
        return work(args)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        job = f"--worker {out} --model {args.model} --batch-size {args.batch_size} --rounds {args.rounds}".split()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*launcher, "-m", "benchmarks.scaling_check", *job]
        subprocess.run(command, check=True, timeout=TIMEOUT, env=environment, cwd=Path(__file__).parents[1])
        measured = json.loads(out.read_text())

    median, buckets = measured["median"], ", ".join(f"{size / 1e6:.1f}" for size in measured["buckets"])
    notes = [
        f"a backward pass takes {median['backward']:.3f} s, and fills buckets of {buckets} MB",
        f"gloo takes {1e3 * median['a number']:.2f} ms for a number, {1e3 * median['a bucket']:.1f} ms for 26.2 MB",
    ]
    report(args, "scaling-check", rows_of(measured), notes)


if __name__ == "__main__":
    main()
