"""preprocessing.py that is stopped, killed or started twice: what is finished stays, and the result is the same."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import preprocessing
from dataset import conversion_journal, preprocess
from dataset.conversion_journal import ConversionJournal
from tests.support import small
from utils.errors import REQUEUE, SIGNALS, InputError
from utils.locks import JobLock

COUNT, BROKEN = 12, (8, 7)  # with one process 3 images are a chunk
GOES_ON = "and the same command goes on from them"
PARTS = ["images.done.tmp-preprocessing", "images.npy.tmp-preprocessing"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for number in range(COUNT):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(256, size=(20, 24, 3), dtype=np.uint8)).save(path)
        if number in BROKEN:
            path.write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The data folder of a job that was left alone."""
    output = tmp_path_factory.mktemp("whole") / "data"
    preprocessing.main(flags(tree, output))
    return output


def flags(tree, output, **more):
    return small.argv(imagenet_path=tree, output_path=output, **dict(resolution=16, num_workers=1) | more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def left(main_argv, capsys, code):
    """The one line that the script leaves with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        preprocessing.main(main_argv)
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == code and len(lines) == 1, lines
    return lines[0]


def assert_same(output, whole):
    assert names(output) == names(whole) == sorted(preprocess.DATA_FILES)
    for name in preprocess.DATA_FILES:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def at_call(function, number, act):
    """The function, before whose call of this number something happens."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_job_goes_on(tree, whole, tmp_path, capsys, monkeypatch, number):
    output = tmp_path / "new" / "data"

    def interrupt():
        with pytest.raises(InputError, match="busy"):  # the place is this job's meanwhile
            JobLock(output / "preprocessing.lock").require_free("busy")
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(ConversionJournal, "add", at_call(ConversionJournal.add, 3, interrupt))
        line = left(flags(tree, output), capsys, 130 if number == signal.SIGINT else REQUEUE)
    assert line.endswith(
        ": stopped: interrupted; the images that are finished stay, and the same command goes on from them"
    )
    assert names(output) == PARTS

    converted, convert = [], preprocess.convert
    noted = lambda root, files, *rest: converted.extend(files) or convert(root, files, *rest)  # noqa: E731
    monkeypatch.setattr(preprocess, "convert", noted)
    preprocessing.main(flags(tree, output, num_workers=2))
    assert len(converted) == COUNT - 2 * 3
    assert_same(output, whole)


def test_interrupted_before_anything_is_finished_nothing_is_left(tree, tmp_path, capsys, monkeypatch):
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(ConversionJournal, "add", at_call(ConversionJournal.add, 1, interrupt))
    left(flags(tree, tmp_path / "new" / "data"), capsys, 130)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", [1, 2, 3, 4])
def test_stopped_while_the_files_get_their_names(tree, whole, tmp_path, capsys, monkeypatch, name, before):
    """Before the first, second or third, and after it; also in the place of a data folder of other images."""
    output, again = tmp_path / "data", {"overwrite": True} if before else {}
    if before:
        small.write_data(output)

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if name < 4:
            patch.setattr(Path, "replace", at_call(Path.replace, name, stop))
        else:
            patch.setattr(preprocess, "sync", at_call(preprocess.sync, 4, stop))  # of the folder
        left(flags(tree, output, **again), capsys, 130)
    monkeypatch.setattr(preprocess, "convert", lambda root, files, *_: (file for file in files))  # none is left
    if name < 4:
        preprocessing.main(flags(tree, output))
        assert_same(output, whole)
    else:
        assert "already" in left(flags(tree, output), capsys, 2)
        assert names(output) == names(whole)  # the journal is of no use any more


def test_a_killed_job_leaves_no_process_and_goes_on(tree, whole, tmp_path, monkeypatch):
    script, output = "tests/support/workers/killed_preprocessing.py", tmp_path / "data"
    job = start(script, tree, output, num_workers=2)
    assert job.wait() == -signal.SIGKILL, job.stderr.read()
    assert none_left(job.pid)
    assert names(output) == [*PARTS, "preprocessing.lock"]

    added, add = [], ConversionJournal.add
    monkeypatch.setattr(ConversionJournal, "add", lambda journal, chunk: added.append(chunk) or add(journal, chunk))
    preprocessing.main(flags(tree, output))
    assert 0 < sum(chunk.count for chunk in added) <= COUNT - 2  # with two processes 1 image is a chunk
    assert_same(output, whole)


def start(script, tree, output, **more):
    """A job in a process group of its own."""
    command = [sys.executable, script, *flags(tree, output, **more)]
    return subprocess.Popen(
        command, cwd=small.ROOT, env=small.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def none_left(group, seconds=20):
    """Whether all processes of a group end within some seconds."""

    def alive(process):
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False

    deadline = time.monotonic() + seconds
    while any(map(alive, psutil.process_iter())):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_of_a_job_is_one_line(tree, tmp_path, number):
    """While they start, which is when they are most easily killed."""
    output = tmp_path / "data"
    job = start("preprocessing.py", tree, output, num_workers=2)
    while len(psutil.Process(job.pid).children()) < 3:  # with that which multiprocessing starts for itself
        time.sleep(0.002)
    os.killpg(job.pid, number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == (130 if number == signal.SIGINT else REQUEUE)
    assert said.count("\n") == 1 and "stopped: interrupted" in said
    assert none_left(job.pid) and not output.exists()


def test_a_killed_process_is_one_line_and_what_is_finished_stays(tree, tmp_path, capsys, monkeypatch):
    kill = lambda: multiprocessing.active_children()[0].kill()  # noqa: E731
    monkeypatch.setattr(ConversionJournal, "add", at_call(ConversionJournal.add, 2, kill))
    line = left(flags(tree, tmp_path / "data"), capsys, 2)
    assert "--num-workers: one of 1 processes was killed, perhaps for want of memory; try fewer; the images" in line
    assert line.endswith(GOES_ON) and names(tmp_path / "data") == PARTS
    assert not {*SIGNALS} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_full_disk_is_one_line_and_what_is_finished_stays(tree, whole, tmp_path, capsys, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion_journal, "FLUSH_SECONDS", -1)
        patch.setattr(conversion_journal, "sync", at_call(conversion_journal.sync, 3, full))
        line = left(flags(tree, tmp_path / "data"), capsys, 2)
    assert f"--output-path: {tmp_path / 'data'} cannot be written: No space left on device; the images" in line
    preprocessing.main(flags(tree, tmp_path / "data"))
    assert_same(tmp_path / "data", whole)


def test_on_error_stop_keeps_what_comes_before(tree, whole, tmp_path, capsys):
    line = left(flags(tree, tmp_path / "data", on_error="stop"), capsys, 2)
    assert f"--on-error stop: {tree / 'a' / '08.png'}: empty file; the images" in line
    assert names(tmp_path / "data") == PARTS
    preprocessing.main(flags(tree, tmp_path / "data"))
    assert_same(tmp_path / "data", whole)


def test_a_job_of_other_settings_is_refused_unless_it_overwrites(tree, whole, tmp_path, capsys, monkeypatch):
    output = tmp_path / "data"
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(ConversionJournal, "add", at_call(ConversionJournal.add, 3, interrupt))
        left(flags(tree, output, resolution=8), capsys, 130)
    before = small.listing(*output.iterdir())
    line = left(flags(tree, output), capsys, 2)
    assert "an interrupted job that this one cannot go on with (resolution: 8, now 16); give another" in line
    assert "images: 12 with names of SHA-256" in left(flags(tree, output, resolution=8, max_images=3), capsys, 2)
    assert small.listing(*output.iterdir()) == before
    preprocessing.main(flags(tree, output, overwrite=True))
    assert_same(output, whole)


def test_a_second_job_is_refused_and_touches_nothing(tree, tmp_path, capsys):
    lock = JobLock(tmp_path / "data" / "preprocessing.lock")
    lock.acquire("")
    before = small.listing(tmp_path)
    line = left(flags(tree, tmp_path / "data"), capsys, 2)
    assert line.endswith(f"--output-path: another job is at work on {tmp_path / 'data'}")
    assert small.listing(tmp_path) == before
    lock.release()
