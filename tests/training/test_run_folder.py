"""A run's folder: what --overwrite clears, and that all processes see the same one."""

import pytest

import train_ldm_only
from tests.support import small
from training import run_folder


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
    """As on node-local disks: else one of them would wait for ever at a step that the others never reach."""
    monkeypatch.setattr("training.run.from_main", lambda value: (5, True))
    with pytest.raises(SystemExit) as leaving:
        train_ldm_only.main(small.ldm_options(place, tmp_path, "run"))
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and "--resume: this process sees step 0, rank 0 step 5" in line
    assert not (tmp_path / "run").exists()
