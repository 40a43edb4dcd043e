"""The memory of a process: its peak, what is left for it, and what the garbage collector looks at."""

import contextlib
import gc
import math
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def peak_gib(device: torch.device) -> float:
    """Of the CUDA allocator; on a CPU of the whole process, Python and torch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak(device: torch.device) -> None:
    """From here on `peak_gib` counts anew; on a CPU where Linux lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def free_bytes() -> float:
    """Of the machine's memory, for this process: what Linux calls available, within its control groups' limits."""
    meminfo, groups = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    free = math.inf
    if meminfo.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    rooms = room_in_groups(groups.read_text(), Path("/sys/fs/cgroup")) if groups.exists() else ()
    return min([free, *rooms])


def room_in_groups(groups: str, root: Path) -> Iterator[int]:
    """Bytes that control groups leave to a process, each with its parents; files' pages count, as they give way.

    Args:
        groups: `/proc/self/cgroup`, of version 1 or 2.
        root: where the groups' folders are.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdecimal():
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
                yield int(most) - int((folder / used).read_text()) + files


@contextlib.contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """Give a function that takes all that lives now out of the garbage collector's sight, until the block ends.

    Networks and optimisers are a few hundred thousand objects, and a full collection looks at each of them: a stall of
    a tenth of a second, on one process while the others wait for it.
    """

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()
