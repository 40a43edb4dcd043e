"""A training script, one process of which meets a fault in a step, before its gradients are known to the others.

    python tests/support/workers/faulty.py FAULT RANK STEP train_ldm_only --exp-name ...

FAULT: a signal that the process sends to itself (`SIGTERM`), to its first loader process (`loader SIGKILL`) or to its
process group (`group SIGTERM`); or an exception that it raises (`InputError`, `TypeError`).
"""

import builtins
import importlib
import multiprocessing
import os
import signal
import sys

import torch

from training.run import Run
from utils import errors


def meet(fault: str) -> None:
    whom, _, what = fault.rpartition(" ")
    if not what.startswith("SIG"):
        raise (getattr(errors, what, None) or getattr(builtins, what))("a fault for a test")
    if whom == "group":
        if os.fork() == 0:  # loader processes obey a signal that comes from their parent
            os.killpg(0, getattr(signal, what))
            os._exit(0)
    else:
        process = multiprocessing.active_children()[0].pid if whom == "loader" else os.getpid()
        os.kill(process, getattr(signal, what))


def main(fault: str, rank: str, step: str, script: str, *argv: str) -> None:
    draws = Run.draws

    def draws_or_fault(run, at_step, micro_step):
        if (run.rank, at_step) == (int(rank), int(step)):
            meet(fault)
        return draws(run, at_step, micro_step)

    Run.draws = draws_or_fault
    torch.set_num_threads(1)
    importlib.import_module(script).main(list(argv))


if __name__ == "__main__":
    main(*sys.argv[1:])
