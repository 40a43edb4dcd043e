"""Scripts' `main(argv)` one after the other on every process; on CPUs the latents' normaliser by itself too.

    torchrun --standalone --nproc_per_node=2 tests/support/workers/distributed.py OUT

reads OUT/jobs.json, {job: [script, argv]}, and writes what each process saw to OUT/<rank>.pt. Processes that must share
a card talk over gloo, as NCCL refuses them.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from dataset.image_sources import ImageArray
from evaluation.evaluator import compare, extract
from models.sit import LatentNorm
from tests.support.evaluation_data import TinyInception, few_sampling_steps, random_images
from tests.support.workers.recorder import recording
from utils.distributed import rank, start_processes, world_size


def run_job(script: str, argv: list[str]) -> dict:
    """The record of one script, with its exit code and its stderr."""
    module = importlib.import_module(script)  # before stderr is replaced: imports may keep it
    stderr, code = io.StringIO(), 0
    with recording() as record, few_sampling_steps(), contextlib.redirect_stderr(stderr):
        try:
            module.main(argv)
        except SystemExit as leaving:
            code = leaving.code
    return record | {"code": code, "stderr": stderr.getvalue()}


def normalise(batch: torch.Tensor) -> dict:
    """Two passes with batch statistics, one with running ones, on this process's share of a batch."""
    norm, share = LatentNorm(batch.shape[1], eps=1e-4, momentum=0.3, affine=False), len(batch) // world_size()
    mine = batch[rank() * share : (rank() + 1) * share]
    outputs = [norm(mine), norm(3 * mine), norm.eval()(mine)]
    return {"outputs": torch.stack(outputs, dim=1), "buffers": norm.state_dict()}


def latents() -> torch.Tensor:
    """A batch whose halves have different statistics, far from zero."""
    halves = torch.randn(2, 4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.cat([halves[0] + 50, 3 * halves[1] + 40])


def evaluate_images(count: int) -> dict[str, float]:
    """All of Inception's metrics of some images, in a stand-in for its space; 20 at a time."""
    network = TinyInception()
    sets = [ImageArray(random_images(n, 8, seed), "images") for n, seed in ((count, 2), (120, 1))]
    samples, reference = (extract(images, network, torch.device("cpu"), batch_size=20) for images in sets)
    return compare(samples, reference, network, torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if 0 < torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        dist.init_process_group("gloo")  # which accelerate takes over, with the card
    results = {"device": start_processes().device.type, "backend": dist.get_backend()}
    out, me = Path(sys.argv[1]), rank()
    if results["device"] == "cpu":
        # 90 images are five batches, the last one short; 15 are one, so that process 1 has none.
        results |= {"normaliser": normalise(latents()), "evaluation": {n: evaluate_images(n) for n in (90, 15)}}
    *jobs, (last, command) = json.loads((out / "jobs.json").read_text()).items()
    with mock.patch("torch.distributed.destroy_process_group"):  # what each would end is needed by the next
        results |= {job: run_job(*words) for job, words in jobs}
    results[last] = run_job(*command)
    torch.save(results, out / f"{me}.pt")
