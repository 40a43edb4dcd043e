"""The journal of a conversion: cut anywhere, or of files that have changed, it never says more than is true."""

import os

import pytest

from dataset import conversion_journal
from dataset.conversion import Chunk, files_state
from dataset.conversion_journal import ConversionJournal
from utils.errors import InputError

FILES = [f"{number}.png" for number in range(6)]


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text(name)
    (tmp_path / "array").touch()
    return tmp_path


def journal(root, **description):
    return ConversionJournal(root / "journal", root / "array", {"resolution": 8} | description)


def chunk(root, first, skipped=()):
    names = FILES[first : first + 2]
    return Chunk(2, dict.fromkeys(skipped, "empty file"), 1, files_state(root, names))


@pytest.fixture
def written(root):
    """The bytes of a journal of three chunks of two files."""
    book = journal(root)
    book.begin()
    for first in (0, 2, 4):
        book.add(chunk(root, first, skipped=FILES[2:3] if first == 2 else ()))
    assert (book.count, book.rows, book.turns) == (6, 5, 3)
    book.close()
    return book.path.read_bytes()


def gone_on(root):
    book = journal(root)
    if book.earlier() is None:
        return 0
    book.go_on(root, FILES)
    assert book.skipped == ({"2.png": "empty file"} if book.count > 2 else {}) and book.turns == book.count // 2
    return book.count


def test_a_journal_cut_anywhere_keeps_its_whole_lines(root, written):
    ends = [i + 1 for i, byte in enumerate(written) if byte == ord("\n")]
    for length in range(len(written) + 1):
        (root / "journal").write_bytes(written[:length])
        whole = sum(end <= length for end in ends)
        assert gone_on(root) == 2 * max(whole - 1, 0)
    for place in range(ends[0], len(written), 7):  # a flipped bit
        (root / "journal").write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        assert gone_on(root) == 2 * (sum(end <= place for end in ends) - 1)


def test_it_goes_on_behind_its_last_whole_line(root, written):
    (root / "journal").write_bytes(written[:-5])
    book = journal(root)
    book.go_on(root, FILES)
    book.add(chunk(root, 4))
    book.close()
    assert book.path.read_bytes() == written
    book.discard()
    assert not book.path.exists()


def test_a_lost_line_ends_it(root, written):
    lines = written.splitlines(keepends=True)
    (root / "journal").write_bytes(b"".join([*lines[:2], lines[3]]))
    assert gone_on(root) == 2


def test_files_that_have_changed_are_not_finished(root, written, caplog):
    os.utime(root / FILES[3], ns=(1, 1))
    assert gone_on(root) == 2
    assert "2.png to 3.png in" in caplog.text and "converted anew from there on" in caplog.text


def test_another_job_is_refused_with_the_difference(root, written):
    journal(root).require_this_job()
    with pytest.raises(InputError, match=r"\(resolution: 8, now 16\).*--overwrite"):
        journal(root, resolution=16).require_this_job()
    book = journal(root, resolution=16)
    book.begin()
    journal(root).require_this_job()  # nothing of it is finished: nobody's loss


def test_lines_come_behind_pixels_and_now_and_then(root, monkeypatch):
    synced, sync = [], conversion_journal.sync
    monkeypatch.setattr(conversion_journal, "sync", lambda path: synced.append((path.name, lines())) or sync(path))

    def lines():
        return (root / "journal").read_bytes().count(b"\n")

    book = journal(root)
    book.begin()
    book.add(chunk(root, 0))
    assert not synced and lines() == 1
    book.close()
    assert synced == [("array", 1), ("journal", 2)]
