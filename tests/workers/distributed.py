"""Scripts' `main(argv)` one after the other on every process, and the latents' normaliser by itself.

    torchrun --standalone --nproc_per_node=2 tests/workers/distributed.py OUT

reads OUT/jobs.json, {job: [script, argv]}, and writes what each process saw to OUT/<rank>.pt.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import torch

from models.sit import LatentNorm
from tests.workers.recorder import recording
from utils.distributed import rank, world_size
from utils.run import start_processes


def run_job(script: str, argv: list[str]) -> dict:
    """The record of one script, with its exit code and its stderr."""
    module = importlib.import_module(script)  # before stderr is replaced: imports may keep it
    stderr, code = io.StringIO(), 0
    with recording() as record, contextlib.redirect_stderr(stderr):
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_processes()
    out = Path(sys.argv[1])
    jobs = json.loads((out / "jobs.json").read_text())
    results = {job: run_job(*command) for job, command in jobs.items()}
    torch.save(results | {"normaliser": normalise(latents())}, out / f"{rank()}.pt")
