"""How long training waits for a checkpoint, and how long its file takes.

    python -m benchmarks.checkpoint --gigabytes 12

`at_once_seconds`: of `write_checkpoint`, for which training waited before. `stall_seconds`: of `Saver.save`, which
copies the state and leaves its file to a thread. `behind_seconds`: until that file is on the disk. `check_seconds`: of
reading all its checksums, before a run goes on from it. REPA-E of SiT-XL/2 and f8d4 has a state of 12.0 GB.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.common import arguments, parse, report, seconds
from training.saver import Saver
from utils.checkpoint import write_checkpoint
from utils.checkpoint_files import checkpoint_path, find_damage

SHAPE = (4608, 1152)  # of the largest matrices of SiT-XL


def measure(state: dict, size: float, device: torch.device, folder: Path) -> dict:
    """A row of the table: the fastest of three rounds of each, in turn."""
    rounds = []
    for step in range(3):
        path, saver = checkpoint_path(folder, step), Saver(folder, limit=1, keep_every=None, resumed_from=None)
        at_once = seconds(lambda path=path: write_checkpoint(path, state), device)
        stall = seconds(lambda saver=saver, step=step: saver.save(step, state), device)
        behind = seconds(saver.wait, device)
        check = seconds(lambda path=path: find_damage(path), device)
        assert saver.failure is None, saver.failure
        rounds.append([at_once.wall, stall.wall, behind.wall, check.wall])
    at_once, stall, behind, check = map(min, zip(*rounds, strict=True))
    times = dict(at_once_seconds=at_once, stall_seconds=stall, behind_seconds=behind, check_seconds=check)
    return {"gigabytes": size, **times}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, help="of the state (default: 12; small: 0.5)")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary one)")
    args = parse(parser, argv)
    args.gigabytes = args.gigabytes or (0.5 if args.small else 12.0)
    count = max(round(args.gigabytes * 1e9 / (4 * SHAPE[0] * SHAPE[1])), 1)
    state = {"model": {f"blocks.{i}": torch.rand(SHAPE, device=args.device) for i in range(count)}}
    size = sum(tensor.nbytes for tensor in state["model"].values()) / 1e9
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(args, "checkpoint", [measure(state, size, args.device, Path(folder))])


if __name__ == "__main__":
    main()
