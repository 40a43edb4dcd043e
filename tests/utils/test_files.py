"""Files that appear whole or not at all, checksums, and room on the disk."""

import json
import os
import shutil
import subprocess

import pytest

from tests.support.refusals import refusal
from utils import files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "sub" / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        assert json.loads(path.read_text()) == {"old": 1}
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    """Not what another one is writing now, nor another file's."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = {name: tmp_path / f"{name}.tmp-{ended.pid}" for name in ("a.json", "b.json")}
    alive = tmp_path / f"a.json.tmp-{os.getppid()}"
    for path in (*left.values(), alive):
        path.touch()
    files.write_json(tmp_path / "a.json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", alive.name, left["b.json"].name}


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_require_disk_looks_at_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    usage = shutil._ntuple_diskusage(10**12, 0, 5 * 10**9)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage)
    files.require_disk(tmp_path / "a" / "b", 5 * 10**9, "--output-dir: it")
    assert asked == [tmp_path]
    message = refusal(files.require_disk, tmp_path / "a" / "b", 251_661_000_000, "--output-dir: it")
    assert message == f"--output-dir: it: 252 GB are needed on the disk of {tmp_path / 'a' / 'b'}, 5 GB are free"
