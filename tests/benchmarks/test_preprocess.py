"""The benchmark of preprocessing.py: photographs as ImageNet has them, and the whole command."""

import json

from PIL import Image

from benchmarks import preprocess


def test_photographs_have_imagenets_usual_size(tmp_path):
    assert 90 < preprocess.write_photographs(tmp_path, 10) < 130  # kB
    sizes = {Image.open(file).size for file in tmp_path.glob("*/*.jpg")}
    assert sizes == {preprocess.SIZE, preprocess.SIZE[::-1]}


def test_the_whole_command_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "DIFFERENT", 2)
    options = f"--device cpu --threads 1 --output {tmp_path} --images 12 --workers 2 --resolution 32"
    preprocess.main(options.split())
    (file,) = tmp_path.glob("preprocess-*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["images"] == 12 and row["workers"] == 2
    assert 0.05 < 12 / row["images_per_core_second"] < 60  # three Pythons start: seconds of their processors count
    assert row["peak_gib"] > 0.05  # of all three
