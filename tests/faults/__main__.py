"""Kill the scripts at random moments, start them again until they end, and compare all they wrote.

    make faults
    python -m tests.faults --scripts train_repae generate --kills 5 --seed 1

Each script runs once undisturbed. Then SIGKILL (for the three that train also SIGTERM) meets the same command again and
again, at moments drawn from --seed: by the clock, or before one of its looks at its files; the main process alone, or
all of its group. A table and benchmarks/results/faults-*.json say what came of it; anything lost is exit code 1.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads; before torch reads it

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, report
from tests.faults.jobs import SCRIPTS, write_jobs
from tests.faults.kills import run_all, run_undisturbed
from tests.faults.outputs import is_known
from tests.support.forks import Fork


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each script by each signal, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="default: all seven")
    parser.add_argument("--log-steps", type=int, default=1, help="of the three that train")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result; default: %(default)s")
    args = parser.parse_args(argv)
    args.device = torch.device("cpu")
    torch.set_num_threads(1)
    began, rows, faults = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as root:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            jobs = write_jobs(Path(root), log_steps=args.log_steps)
        Fork("tests/faults/__init__.py").wait()  # the imports are no part of a job's seconds
        for name in args.scripts:
            job = jobs[name]
            whole = run_undisturbed(job, Path(root))
            print(f"{name}: {whole.seconds:.1f} s, {whole.looks} looks", flush=True)
            for number in (signal.SIGKILL, signal.SIGTERM) if job.trains else (signal.SIGKILL,):
                outcome = run_all(job, number, whole, kills=args.kills, seed=args.seed)
                row = {"script": name, "signal": number.name, "kills": outcome.kills, "restarts": outcome.restarts}
                row |= {"jobs": outcome.jobs, "survived": outcome.survived, "equal": outcome.equal}
                rows.append(row | {"left over": outcome.jobs - outcome.clean})
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                faults += outcome.faults
    notes = [f"{'known' if is_known(fault) else 'FAULT'}: {fault}" for fault in faults]
    print(report(args, "faults", rows, [*notes, f"{time.monotonic() - began:.0f} s"]))
    return 0 if all(map(is_known, faults)) else 1


if __name__ == "__main__":
    sys.exit(main())
