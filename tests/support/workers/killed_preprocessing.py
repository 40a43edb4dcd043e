"""preprocessing.py that dies by SIGKILL while its third chunk is brought to the disk, before that counts as finished.

python tests/support/workers/killed_preprocessing.py --imagenet-path ...
"""

import os
import signal
import sys

import preprocessing
from dataset import conversion_journal

sync, synced, add = conversion_journal.sync, [], conversion_journal.ConversionJournal.add


def sync_or_die(path):
    synced.append(path)
    if len(synced) == 2 * 2 + 1:  # the array and the journal of two chunks before
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)


def add_and_wait(journal, chunk):
    """Each chunk has a flush of its own, however slow the disk is."""
    add(journal, chunk)
    journal._flushed.result()


if __name__ == "__main__":  # not in the processes that it starts
    conversion_journal.FLUSH_SECONDS, conversion_journal.sync = -1, sync_or_die
    conversion_journal.ConversionJournal.add = add_and_wait
    preprocessing.main(sys.argv[1:])
