"""Two processes of torchrun, and what they must have in common with one, on CPUs as on cards."""

import json
from pathlib import Path

import torch

from tests.support import small


def run_on_two(folder: Path, jobs: dict[str, tuple[str, list[str]]]) -> tuple[dict, dict]:
    """What process 0 and process 1 saw of {job: (script, argv)} (`tests.support.workers.distributed`)."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = small.run_python(*launch, "tests/support/workers/distributed.py", folder)
    assert done.returncode == 0, done.stderr
    return tuple(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


def assert_draws_and_data_of_one(whole: dict, processes: list[dict]) -> None:
    """Draws and batches of the two, joined, are bit for bit those of one process; and no two shares are the same.

    Args:
        whole, processes: what `tests.support.workers.recorder` wrote down of one job.
    """
    for kind in ("draws", "batches"):
        expected, shares = whole[kind], [process[kind] for process in processes]
        assert expected and len(shares[0]) == len(shares[1]) == len(expected)
        for one, *parts in zip(expected, *shares, strict=True):
            if kind == "draws":
                assert one[0] == parts[0][0] == parts[1][0]
                one, parts = one[1:], [part[1:] for part in parts]
            for tensor, *pieces in zip(one, *parts, strict=True):
                assert torch.equal(tensor, torch.cat(pieces)) and not torch.equal(*pieces)


def assert_equal_on_both(whole: dict, processes: list[dict]) -> None:
    """Gradients of every parameter that has one, before clipping, bit for bit; and the weights of each checkpoint."""
    for process in processes:
        assert [step.keys() for step in process["gradients"]] == [step.keys() for step in whole["gradients"]]
        assert all(difference == 0 for step in process["gradients"] for _, difference in step.values())
    assert processes[0]["weights"] == processes[1]["weights"] != []
