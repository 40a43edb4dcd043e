"""cache_latents.py whose processes all get a signal after its third batch is written, as by Ctrl-C or a scheduler.

python tests/support/workers/signalled_cache.py SIGTERM --vae-latents-name ...
"""

import os
import signal
import sys

import torch

import cache_latents
from dataset.latent_cache import LatentCache

torch.set_num_threads(1)
os.setpgid(0, 0)  # a group of this process and those that it starts
number, write, written = signal.Signals[sys.argv.pop(1)], LatentCache.write, []


def write_and_signal(cache, first, mean_std):
    write(cache, first, mean_std)
    written.append(first)
    if len(written) == 3:
        os.killpg(0, number)


LatentCache.write = write_and_signal
cache_latents.main(sys.argv[1:])
