"""Images converted by several processes: their order, and what cannot be written or is killed."""

import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.conversion import Target, _work, convert, files_state
from dataset.preprocess import _read_image
from utils.errors import SIGNALS, InputError

READ = partial(_read_image, resolution=4, exif_orientation=False)
BROKEN = (0, 5, 6)


@pytest.fixture
def tree(tmp_path):
    """13 images of one value each, 1 to 13, three of them broken; the first takes far longer than the others."""
    for number in range(13):
        Image.new("L", (4, 4) if number else (2000, 2000), number + 1).save(tmp_path / f"{number:02}.png")
        if number in BROKEN:
            (tmp_path / f"{number:02}.png").write_bytes(b"")
    return tmp_path


def names(tree):
    return sorted(path.name for path in tree.glob("*.png"))


def test_images_lie_in_order_behind_the_header_and_the_first_row(tree):
    array = tree / "array"
    array.write_bytes(b"header" + b"\xff" * 48)
    chunks = list(convert(tree, names(tree), READ, Target(array, 6, 48), 1, 2))
    assert sum(chunk.count for chunk in chunks) == 13 and len(chunks) > 6
    assert [name for chunk in chunks for name in chunk.skipped] == [f"{number:02}.png" for number in BROKEN]
    written = np.frombuffer(array.read_bytes()[6:], np.uint8).reshape(-1, 48)
    assert [set(row) for row in written] == [{255}, *({n + 1} for n in range(13) if n not in BROKEN)]
    assert not multiprocessing.active_children()


def test_a_disk_that_takes_no_more_is_an_error_of_the_parent(tree):
    with pytest.raises(OSError, match="No space left"):
        list(convert(tree, names(tree), READ, Target(Path("/dev/full"), 6, 48), 0, 1))


def test_a_killed_process_is_named_and_the_others_end(tree):
    (tree / "array").touch()
    chunks = convert(tree, names(tree), READ, Target(tree / "array", 6, 48), 0, 2)
    next(chunks)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(InputError, match="one of 2 processes was killed, perhaps for want of memory"):
        list(chunks)
    assert not multiprocessing.active_children()


def test_signals_are_the_parents(tree):
    (tree / "array").touch()
    chunks = convert(tree, names(tree), READ, Target(tree / "array", 6, 48), 0, 2)
    next(chunks)
    for process in multiprocessing.active_children():
        for number in SIGNALS:
            os.kill(process.pid, number)
    assert sum(chunk.count for chunk in chunks) == 12


def test_nothing_is_read_for_a_parent_that_is_gone(tree):
    ours, theirs = multiprocessing.Pipe()
    ours.send(names(tree))
    ours.close()
    read = []
    _work(theirs, tree, read.append, None)
    assert read == []


def test_another_size_or_time_is_another_state(tree):
    files = names(tree)
    state = files_state(tree, files)
    assert files_state(tree, files) == state != files_state(tree, files[::-1])
    os.utime(tree / files[3], ns=(1, 1))
    touched = files_state(tree, files)
    (tree / files[3]).unlink()
    assert len({state, touched, files_state(tree, files)}) == 3
