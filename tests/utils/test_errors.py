"""What ends a job: one line for what a user can mend, a traceback for our own faults."""

import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch

from utils.errors import REQUEUE, command, on_signals, signals_held_back


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.npy"), "stopped: x.npy: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "stopped: x: Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "smaller batch needs less (CUDA out of memory. Tried)"),
        (
            RuntimeError("NCCL error ncclRemoteError: a remote\nprocess exited"),
            "rank 0 has lost another process, which",
        ),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal"), "a loader process is gone, perhaps for want"),
    ],
)
def test_what_stops_a_job_on_its_way_is_one_line(error, said, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        command(main)()
    line = capsys.readouterr().err
    assert stopped.value.code == 1 and said in line and line.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_our_own_faults_keep_their_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        command(main)()


def test_ctrl_c_that_lost_its_way_in_another_error_is_still_one_line(capsys):
    """As when a process that is interrupted tells the others so, and they are gone already."""

    def main(argv):
        try:
            raise KeyboardInterrupt("interrupted")
        finally:
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(SystemExit) as stopped:
        command(main)()
    assert stopped.value.code == 130 and capsys.readouterr().err.count("stopped: interrupted") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)])
def test_a_signal_that_meets_a_destructor_is_not_lost(number, code, capsys):
    """There Python drops what its handler raises, as while a loader is taken down."""

    class Dying:
        def __del__(self):
            signal.raise_signal(number)

    def main(argv):
        Dying()
        time.sleep(10)

    with pytest.raises(SystemExit) as stopped:
        command(main)()
    assert stopped.value.code == code and capsys.readouterr().err.endswith("stopped: interrupted\n")


def test_what_is_held_back_comes_afterwards_and_reaches_no_process_that_was_started_meanwhile():
    heard, context = [], multiprocessing.get_context("fork")
    with on_signals(lambda number, _: heard.append(number)):
        with signals_held_back():
            child = context.Process(target=time.sleep, args=(0.2,))
            child.start()
            for process in (child.pid, os.getpid()):
                os.kill(process, signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
    child.join()
    assert child.exitcode == 0
