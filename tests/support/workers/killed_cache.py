"""cache_latents.py that dies by SIGKILL after its third batch is written, before that counts as finished.

python tests/support/workers/killed_cache.py --vae-latents-name ...
"""

import os
import signal
import sys

import torch

import cache_latents
from dataset.latent_cache import LatentCache

torch.set_num_threads(1)
flush, flushed = LatentCache.flush, []


def flush_or_die(cache):
    flushed.append(cache)
    if len(flushed) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(cache)


cache_latents.FLUSH_SECONDS, LatentCache.flush = 0, flush_or_die
cache_latents.main(sys.argv[1:])
