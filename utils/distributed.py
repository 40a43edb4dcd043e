"""The processes of a job: their start, sums and rows over them, and how they fail together.

Without a process group everything is that of this process alone.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import InputError


def start_processes():
    """accelerate's view of the processes: CUDA with NCCL, else CPU with gloo.

    Raises:
        InputError: the launcher asked for something that these scripts do not do.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    if asked := [name for variable, name in _PLUGINS.items() if _is_on(variable)]:
        raise _not_plain(" and ".join(asked))

    # Rank 0 may download weights or measure a data set while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    # Precision and compiling are the scripts' own: a dynamo backend of accelerate's would switch TF32 on.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", dynamo_backend="no", kwargs_handlers=[patience]
    )

    # Without CUDA accelerate can take every process of a launcher for the only one, which would train as many runs.
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(f"the launcher started {launched} processes, but each of them runs alone; use torchrun")
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise _not_plain(accelerator.distributed_type.value)
    return accelerator


# What accelerate's launcher switches on in the environment. Left to accelerate, FSDP on a CPU is accepted without a
# word, and the others end in a traceback wherever their packages are missing.
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off", "n", "f")


def _not_plain(asked: str) -> InputError:
    advice = "run `accelerate config` again, use a file of configs/accelerate, or torchrun"
    return InputError(f"accelerate is configured for {asked}; these scripts run plain data parallel alone: {advice}")


# What accelerate's launcher and its configuration file hand on in the environment, and its value where nobody chose it.
_LAUNCHER = {"mixed_precision": "no", "gradient_accumulation_steps": "1", "dynamo_backend": "no"}


def launcher_notes(**here: tuple[str, str]) -> list[str]:
    """A line for each setting of accelerate's launcher that asks for something else than the script does.

    Args:
        here: for a setting, what the script does in the launcher's words, and what says so: `("bf16", "--precision")`.
    """
    notes = []
    for setting, (value, counts) in here.items():
        asked = os.environ.get(f"ACCELERATE_{setting.upper()}", _LAUNCHER[setting]).lower()
        if asked not in (_LAUNCHER[setting], value):
            notes.append(f"accelerate is configured for {setting} {asked}, which does not count here: {counts} does")
    return notes


def launched_rank() -> int:
    """This process's number as the launcher says it, before any process group is started."""
    return int(os.environ.get("RANK", 0))


def rank() -> int:
    """This process's number, over all machines; rank 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(tensor: torch.Tensor) -> None:
    """Sum a tensor over all processes, in place, on whatever device it is."""
    if world_size() == 1:
        return
    moved = tensor.to(_device()).contiguous()
    dist.all_reduce(moved)
    tensor.copy_(moved)


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows (first dimension) of all processes in order of rank, on every process; their numbers may differ."""
    if world_size() == 1:
        return tensor

    # How many rows each process has.
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(tensor)
    all_sum(counts)

    # A collective call wants equal shapes: padded to the longest, and cut again.
    padded = torch.zeros(int(counts.max()), *tensor.shape[1:], dtype=tensor.dtype, device=_device())
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).to(tensor.device)


def from_main(value):
    """Rank 0's value, any plain object, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _device() -> torch.device:
    """Where the process group's backend wants its tensors."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes run the block, each its own share, and wait for each other; when it fails on one, all leave.

    The block makes no collective call. The processes that failed say why, with their ranks.
    """
    failure = None
    try:
        yield
    except InputError as error:
        failure = error

    # Each process has come to an end; whether of the block or in it is known to all after this sum.
    failures = torch.tensor(float(failure is not None))
    all_sum(failures)
    if failures > 0 and failure is None:
        failure = InputError("another process failed")
        failure.printed = True
    if failure is not None:
        raise failure


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others do; when it fails on rank 0, rank 0 alone says why and all leave.

    For checks that every process would fail alike, and for downloads.
    """
    if world_size() == 1:
        yield
        return

    # The others wait for rank 0's verdict: None, or why it leaves.
    verdict = [None]
    if rank() > 0:
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None:
            failure = InputError(verdict[0])
            failure.printed = True  # rank 0 has said it (utils.errors.command)
            raise failure
        yield
        return

    # Rank 0 gives it in any case, or the others would wait for ever.
    try:
        yield
    except BaseException as error:
        verdict = [str(error) or type(error).__name__]
        with contextlib.suppress(RuntimeError):  # the others may be gone, as after Ctrl-C; what is raised here counts
            dist.broadcast_object_list(verdict, src=0)
        raise
    dist.broadcast_object_list(verdict, src=0)
