"""The benchmark of reading: every data set that a training script reads, with and without loader processes."""

import json

import pytest

from benchmarks import data
from dataset.data import ImageData, LatentData


def result(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_every_data_set_is_read_by_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RESOLUTION", 16)
    options = f"--device cpu --threads 1 --output {tmp_path} --images 64 --batch-size 16 --workers 0,1 --seconds 0.06"
    data.main(options.split())
    rows = result(tmp_path)["rows"]
    assert [(row["what"], row["workers"]) for row in rows[:3]] == [("images", 0), ("images", 1), ("f8d4 latents", 0)]
    assert len(rows) == 5 * 2
    for row in rows:
        assert row["images_per_second"] > 0 and row["first_batch_seconds"] > 0
        assert row["cores_at_goal"] * row["images_per_core_second"] == pytest.approx(data.GOAL)


def test_its_folder_is_one_that_training_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RESOLUTION", 16)
    data.write_data_folder(tmp_path, 5)
    assert ImageData(tmp_path, resolution=16).images.shape == (5, 3, 16, 16)
    assert {name: LatentData(tmp_path / name).array.shape[1:] for name in data.LATENTS} == data.LATENTS
