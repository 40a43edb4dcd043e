"""Each script once as a process of its own, fresh where that shows more than a fork.

For cache_latents.py and generate.py, and for several processes, see test_cache_latents.py, test_generate.py and
test_distributed.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import small
from tests.support.forks import Fork


@pytest.fixture(scope="module")
def processes(place, tmp_path_factory):
    """Folder, and the finished process of every script, two at a time."""
    folder = tmp_path_factory.mktemp("scripts")
    exps, short = folder / "exps", dict(max_train_steps=2)
    for i in range(6):
        path = folder / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 40, 3), 40 * i, np.uint8)).save(path)
    fresh, forked = small.run_python, lambda *words: Fork(*words).wait()
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")
    trees = dict(imagenet_path=folder / "images", output_path=folder / "data", resolution=24, num_workers=2)
    repae = small.repae_options(place, exps, "repae", num_workers=1, num_preview=2, deterministic=True, **short)
    refused = small.repae_options(place, exps, "refused", data_dir=folder / "none")
    first = {
        "preprocessing": (fresh, "preprocessing.py", *small.argv(**trees)),
        "train_repae": (forked, "train_repae.py", *repae),
        "train_ldm_only": (fresh, *launch, "train_ldm_only.py", *small.ldm_options(place, exps, "ldm", **short)),
        "train_vae": (forked, "train_vae.py", *small.vae_options(place, exps, "vae", **short)),
        "refused": (fresh, "train_repae.py", *refused),
    }
    checkpoint = exps / "repae" / "checkpoints" / "0000002.pt"
    vae = dict(repae_ckpt=checkpoint, vae_name="e2e", save_dir=exps)
    images = dict(reconstruct=True, vae_ckpt=place.vae, data_dir=place.data, features="none", lpips=False)
    then = {
        "save_vae_weights": (forked, "save_vae_weights.py", *small.argv(**vae)),
        "evaluate": (forked, "evaluate.py", *small.argv(**images, output=folder / "reconstruction.json")),
    }
    done = {}
    with ThreadPoolExecutor(2) as pool:
        for stage in (first, then):
            started = pool.map(lambda words: words[0](*words[1:]), stage.values())
            done |= dict(zip(stage, started, strict=True))
    return folder, done


def test_every_script_runs(processes):
    folder, done = processes
    for name, process in done.items():
        assert process.returncode == (2 if name == "refused" else 0), (name, process.stderr)
        assert "Traceback" not in process.stderr, (name, process.stderr)
    expected = [
        "data/images.npy",
        "exps/repae/samples/0000002-samples.png",
        "exps/vae/vae.pt",
        "exps/ldm/checkpoints/0000002.pt",
        "exps/e2e/e2e.pt",
        "exps/e2e/diffusers/config.json",
        "reconstruction.json",
    ]
    assert [name for name in expected if not (folder / name).is_file()] == []


def test_what_they_wrote_is_whole(processes):
    folder, _ = processes
    assert np.load(folder / "data" / "images.npy").shape == (6, 3, 24, 24)
    assert np.load(folder / "data" / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1]
    for name in ("repae", "vae", "ldm"):
        rows = small.metrics(folder / "exps", name)
        assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(list(row.values())).all() for row in rows)
        assert json.loads((folder / "exps" / name / "args.json").read_text())["exp_name"] == name
    checkpoint = small.checkpoint(folder / "exps", "repae", 2)
    exported = torch.load(folder / "exps" / "e2e" / "e2e.pt")
    assert all(torch.equal(checkpoint["vae"][key], tensor) for key, tensor in exported.items())


def test_a_refusal_is_one_line_of_a_real_process_too(processes):
    """Imports and libraries add nothing to stderr."""
    folder, done = processes
    lines = done["refused"].stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_repae.py: error: --data-dir"), lines
    assert done["refused"].stdout == "" and not (folder / "exps" / "refused").exists()
