"""generate.py that dies by SIGKILL half-way through writing its third batch.

python tests/support/workers/killed_sampler.py --exp-path ...
"""

import os
import signal
import sys

import torch

import generate
from sampling.store import SampleStore

torch.set_num_threads(1)
write, written = SampleStore.write, []


def write_and_die(store, batch, images):
    written.append(batch)
    if len(written) == 3:
        indices = store.indices(batch)
        half = images[: len(indices) // 2].tobytes()
        with store.images_file.open("r+b") as file:
            file.seek(store.images().offset + indices.start * images[0].nbytes)
            file.write(half)
        os.kill(os.getpid(), signal.SIGKILL)
    write(store, batch, images)


SampleStore.write = write_and_die
generate.main(sys.argv[1:])
