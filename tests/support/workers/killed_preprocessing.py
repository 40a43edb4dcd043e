"""preprocessing.py that dies by SIGKILL while its third chunk is brought to the disk, before that counts as finished.

python tests/support/workers/killed_preprocessing.py --imagenet-path ...
"""

import os
import signal
import sys

import preprocessing
from dataset import conversion_journal

sync, synced = conversion_journal.sync, []


def sync_or_die(path):
    synced.append(path)
    if len(synced) == 2 * 2 + 1:  # the array and the journal of two chunks before
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)


if __name__ == "__main__":  # not in the processes that it starts
    conversion_journal.FLUSH_SECONDS, conversion_journal.sync = -1, sync_or_die
    preprocessing.main(sys.argv[1:])
