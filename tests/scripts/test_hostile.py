"""Whole scripts on hostile inputs, as a user sees them: the right result or one line, no wait and no traceback."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import preprocessing
from tests.support import sampling, small
from tests.support.hostile import Planted
from tests.utils.test_torch_files import compress


@pytest.fixture
def tree(tmp_path):
    """Two pictures that can be read, and all that a folder can hold beside them."""
    root = tmp_path / "tree"
    for name in ("cat\nor dog", "\x1b[2Jred", os.fsdecode(b"\xffbytes"), "a.jpg"):
        (root / name).mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    picture.save(root / "cat\nor dog" / "1\n.png")
    picture.convert("CMYK").save(root / "\x1b[2Jred" / "2.jpg")
    whole = (root / "\x1b[2Jred" / "2.jpg").read_bytes()
    (root / "a.jpg" / "cut.jpg").write_bytes(whole[:-300])
    (root / "a.jpg" / "text.png").write_text("#!/bin/sh\n")
    (root / "a.jpg" / "gone.png").symlink_to("nowhere")
    (root / "a.jpg" / "self.png").symlink_to("self.png")
    (root / "a.jpg" / "up").symlink_to(root)
    os.mkfifo(root / "a.jpg" / "pipe.png")
    Image.new("1", (9500, 9500)).save(root / os.fsdecode(b"\xffbytes") / "bomb.png")
    return root


def test_preprocessing_takes_what_is_whole_and_names_the_rest(tree, tmp_path, capsys):
    preprocessing.main(small.argv(imagenet_path=tree, output_path=tmp_path / "data", resolution=24, num_workers=1))
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert [os.path.basename(name) for name in info["sources"]] == ["2.jpg", "1\n.png"]  # noqa: PTH119
    skipped = {entry["file"].split("/")[-1]: entry["reason"] for entry in info["skipped"]}
    assert skipped.keys() == {"cut.jpg", "text.png", "gone.png", "self.png", "bomb.png"}
    assert "truncated" in skipped["cut.jpg"] and "exceeds limit" in skipped["bomb.png"]
    assert info["left_out"] == {"links back": 1, "pipes and devices": 1}
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out and "cat\n" not in said.err + said.out


@pytest.mark.parametrize("kind", ["planted", "packed zeros", "numbers repeated", "page"])
def test_generate_refuses_a_hostile_checkpoint_in_one_line(exps, tmp_path, capsys, monkeypatch, kind):
    file = tmp_path / "x.pt"
    contents = torch.load(exps / "repae" / "checkpoints" / "0000007.pt")
    if kind == "planted":
        torch.save(contents | {"args": Planted(tmp_path / "trace")}, file)
    elif kind == "numbers repeated":
        contents["ema"]["x_embedder.proj.weight"] = torch.zeros(1).expand(10**5, 10**5, 2, 2)
        torch.save(contents, file)
    elif kind == "packed zeros":
        monkeypatch.setattr("utils.torch_files._SMALL", 1 << 20)
        torch.save({"ema": {"w": torch.zeros(1 << 20)}, "args": {}}, tmp_path / "whole.pt")
        compress(tmp_path / "whole.pt", file)
    else:
        file.write_text("<html>404</html>")
    words = {
        "planted": "holds an object of posix.system",
        "packed zeros": "unpacks to 0.00419 GB",
        "numbers repeated": "more than the file can hold",
        "page": "is no torch checkpoint",
    }
    line = sampling.refused(small.argv(exp_path=file, sample_dir=tmp_path / "s"), capsys, tmp_path)
    assert words[kind] in line and not (tmp_path / "trace").exists()


def test_generate_takes_no_broken_options(exps, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "0000007.pt").symlink_to(exps / "repae" / "checkpoints" / "0000007.pt")
    (run / "args.json").write_text("[" * 100_000)
    line = sampling.refused(small.argv(exp_path=run, sample_dir=tmp_path / "s"), capsys, tmp_path)
    assert "--exp-path" in line and "args.json: cannot be read as JSON" in line
