"""A run's folder: what --overwrite clears, which checkpoint a run goes on from, which stay, and whose it is."""

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch

import train_ldm_only
from tests.support import small
from training import run_folder
from training.saver import Saver
from utils.checkpoint import write_checkpoint
from utils.checkpoint_files import checkpoint_path, checkpoint_steps, find_damage
from utils.locks import JobLock


def test_overwrite_takes_the_link_to_a_larger_disk_and_not_what_lies_there(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (disk / "0000001.pt").write_text("mine")
    (run / "checkpoints").symlink_to(disk)
    (run / "args.json").write_text("{}")
    run_folder.clear(run, "logs")
    assert list(run.iterdir()) == [] and (disk / "0000001.pt").read_text() == "mine"


def test_processes_that_see_other_folders_are_refused(place, tmp_path, monkeypatch, capsys):
    """As on node-local disks."""
    elsewhere = run_folder.Start(5, tmp_path / "node0" / "0000005.pt", goes_on=True)
    monkeypatch.setattr("training.run.from_main", lambda value: elsewhere)
    with pytest.raises(SystemExit) as leaving:
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run"))
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and f"rank 0 goes on from {elsewhere.checkpoint}, which this process does" in line
    assert not (tmp_path / "run").exists()


# Which checkpoint a run goes on from


def options(place, tmp_path, **more) -> list[str]:
    usual = dict(checkpointing_steps=1, max_train_steps=4, enc_type="None", proj_coeff=0)
    return small.ldm_options(place, tmp_path, "run", **usual | more)


@pytest.fixture
def trained(place, tmp_path):
    """A run of three steps, with a checkpoint of each."""
    train_ldm_only.main(options(place, tmp_path, max_train_steps=3))
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_a_bit(path: Path) -> None:
    """In the middle of the weights, where reading alone notices nothing."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0)]
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, place, trained, tmp_path):
    damage(trained / "checkpoints" / "0000003.pt")
    train_ldm_only.main(options(place, tmp_path, resume="latest"))
    log = (trained / "log.txt").read_text()
    assert "0000003.pt is damaged (" in log and "the one before it is taken" in log
    assert names(trained) == [f"000000{n}" for n in ("1.pt", "2.pt", "3.pt", "3.pt.set-aside", "4.pt")]
    assert [row["step"] for row in small.metrics(tmp_path, "run")] == [1, 2, 3, 4]
    small.assert_same(small.checkpoint(tmp_path, "run", 3)["steps"], 3)


def test_nothing_is_trained_afresh_where_all_are_damaged(place, trained, tmp_path, capsys):
    for path in (trained / "checkpoints").iterdir():
        flip_a_bit(path)
    before = small.listing(trained)
    for resume, said in (("latest", "every checkpoint in"), ("2", "0000002.pt is damaged: the checksum of")):
        with pytest.raises(SystemExit) as leaving:
            train_ldm_only.main(options(place, tmp_path, resume=resume))
        assert leaving.value.code == 2 and said in capsys.readouterr().err
    assert small.listing(trained) == before


def test_a_course_that_was_left_is_set_aside_and_no_later_job_takes_it_up(place, trained, tmp_path):
    train_ldm_only.main(options(place, tmp_path, resume="1", max_train_steps=2, learning_rate=1e-3))
    assert names(trained) == [f"000000{n}" for n in ("1.pt", "2.pt", "2.pt.set-aside", "3.pt.set-aside")]
    train_ldm_only.main(options(place, tmp_path, resume="latest", max_train_steps=3))
    assert "is later than step 1, from which the run goes on" in (trained / "log.txt").read_text()
    assert small.checkpoint(tmp_path, "run", 3)["steps"] == 3


def test_a_job_started_again_goes_on_in_its_own_folder(place, trained, tmp_path):
    """It began from another run's checkpoint, and the scheduler starts the same command."""
    words = options(place, tmp_path, resume="latest", continue_train_exp_dir=trained)
    words[words.index("--exp-name") + 1] = "new"
    for steps in (4, 5):
        train_ldm_only.main([*words, "--max-train-steps", str(steps)])
    assert [row["step"] for row in small.metrics(tmp_path, "new")] == [4, 5]


# Which checkpoints stay


@pytest.mark.parametrize(
    ("limit", "keep_every", "resumed", "kept"),
    [
        (2, None, None, [7, 8]),
        (2, 3, None, [3, 6, 7, 8]),
        (3, None, 2, [2, 6, 7, 8]),
        (None, 3, None, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_newest_stay(limit, keep_every, resumed, kept, tmp_path):
    saver = Saver(tmp_path, limit=limit, keep_every=keep_every, resumed_from=resumed)
    for step in range(1, 9):
        saver.save(step, {"x": torch.zeros(1)})
    saver.wait()
    assert checkpoint_steps(tmp_path) == kept


def test_what_is_saved_is_what_was_when_it_was_asked_for(tmp_path, monkeypatch):
    """The weights move on while the file is written."""
    weights, saver = torch.zeros(3), Saver(tmp_path, limit=None, keep_every=None, resumed_from=None)
    changed, write = threading.Event(), saver._write
    monkeypatch.setattr(saver, "_write", lambda *words, **named: (changed.wait(), write(*words, **named)))
    saver.save(1, {"model": OrderedDict(x=weights), "steps": 1})
    weights += 1
    changed.set()
    saver.wait()
    saved = torch.load(checkpoint_path(tmp_path, 1))
    assert torch.equal(saved["model"]["x"], torch.zeros(3)) and saved["steps"] == 1


def test_without_memory_for_a_copy_the_file_is_written_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("training.saver.free_bytes", lambda: 10)
    saver = Saver(tmp_path, limit=None, keep_every=None, resumed_from=None)
    saver.save(1, {"x": torch.zeros(9)})
    assert checkpoint_steps(tmp_path) == [1] and "training waits for the checkpoint" in caplog.text


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(place, tmp_path, monkeypatch, capsys):
    """It is said, the next is tried, and the job fails where the last one is not on the disk."""
    for failing, code in (([2], 0), ([2, 4], 1)):
        with monkeypatch.context() as patch:
            patch.setattr("training.saver.write_checkpoint", partial(_write, failing))
            leaving = contextlib.nullcontext() if code == 0 else pytest.raises(SystemExit)
            with leaving as left:
                train_ldm_only.main(options(place, tmp_path, overwrite=True))
        said = capsys.readouterr().err
        assert "step 2: the checkpoint was not written (No space left on device)" in said
        assert checkpoint_steps(tmp_path / "run") == [step for step in (1, 2, 3, 4) if step not in failing]
        if code:
            assert left.value.code == 1 and "stopped: " in said.splitlines()[-1]


def _write(failing: list[int], path: Path, contents: dict) -> None:
    if contents["steps"] in failing:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    write_checkpoint(path, contents)


# Whose folder it is


def test_a_second_job_leaves_the_first_ones_folder_alone(place, trained, tmp_path, capsys):
    lock = JobLock(trained / run_folder.LOCK)
    lock.acquire("")
    before = small.listing(trained)
    for more in ({"resume": "latest"}, {"overwrite": True}):
        with pytest.raises(SystemExit) as leaving:
            train_ldm_only.main(options(place, tmp_path, **more))
        line = capsys.readouterr().err.splitlines()[-1]
        assert leaving.value.code == 2 and line.endswith(f"--exp-name: another job is at work in {trained}")
    assert small.listing(trained) == before
    lock.release()
    train_ldm_only.main(options(place, tmp_path, resume="latest"))
    assert not (trained / run_folder.LOCK).exists()


def test_a_job_that_died_early_leaves_a_folder_that_can_be_taken(place, tmp_path):
    """Before its args.json was whole; and while --overwrite was clearing an older run."""
    run = tmp_path / "run"
    run.mkdir()
    for name in (run_folder.LOCK, "args.json.tmp-77"):
        (run / name).touch()
    train_ldm_only.main(options(place, tmp_path, max_train_steps=1))
    order = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: order.append(path.name))
        patch.setattr(run_folder.shutil, "rmtree", lambda path: order.append(path.name))
        run_folder.clear(run, "logs")
    assert order[-1] == "args.json"


def test_every_bit_of_a_checkpoint_is_looked_at(tmp_path):
    """Where torch would not read it, or zipfile raises errors of other kinds, it is damaged, and no traceback."""
    path = tmp_path / "x.pt"
    write_checkpoint(path, {"model": {"x": torch.arange(4.0)}, "args": {}})
    whole = path.read_bytes()
    assert find_damage(path) is None
    for bit in range(0, 8 * len(whole), 97):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        if find_damage(path) is None:  # between the members, where nothing is
            assert torch.equal(torch.load(path)["model"]["x"], torch.arange(4.0))


def test_a_checkpoint_knows_what_made_it(trained):
    made_by = torch.load(trained / "checkpoints" / "0000003.pt")["made_by"]
    assert set(made_by) == {"commit", "versions", "command", "data_fingerprint"}
    assert made_by["versions"]["torch"] == torch.__version__.split("+")[0] and len(made_by["data_fingerprint"]) == 64
    assert f"commit {made_by['commit']}; python" in (trained / "log.txt").read_text()
