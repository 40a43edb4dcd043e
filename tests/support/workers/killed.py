"""A training script that dies by SIGKILL half-way through writing its third checkpoint, and half-way through a line.

python tests/support/workers/killed.py train_repae --exp-name ...
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
script, *argv = sys.argv[1:]
save, written = torch.save, []


def save_and_die(contents, path):
    save(contents, path)
    written.append(path)
    if len(written) == 3:
        os.truncate(path, Path(path).stat().st_size // 2)
        with (Path(path).parent.parent / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "vae_lo')
        os.kill(os.getpid(), signal.SIGKILL)


torch.save = save_and_die
importlib.import_module(script).main(argv)
