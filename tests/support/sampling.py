"""Runs to sample from, one job of generate.py, and what its refusals look like."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
from models.sit import SiT
from models.vae import load_vae, vae_config
from models.vae_keys import to_ldm
from sampling.store import SampleStore
from tests.support import small

SIDE, CLASSES, COUNT, BATCH = 24, 10, 20, 8  # 24 x 24 pixels, latents 4 x 6 x 6; the third batch is a short one


def random_sit(seed: int) -> SiT:
    """A SiT all of whose weights matter (a fresh one predicts zero), with as many heads as SiT-T."""
    torch.manual_seed(seed)
    shape = dict(input_size=SIDE // 4, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3)
    projector = dict(encoder_depth=1, z_dims=[8], projector_dim=16)
    sit = SiT(**shape, **projector, num_classes=CLASSES, class_dropout_prob=0.1)
    for name, parameter in sit.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    sit.set_latent_stats(torch.full((1, 4, 1, 1), 0.5), torch.full((1, 4, 1, 1), 0.3))
    return sit


def write_runs(folder: Path) -> Path:
    """Runs: `repae`; `swapped`, whose average and raw weights are exchanged; `public`, as the public code writes it;
    `ldm`, whose VAE lies in a file; `cosine`, another path; `plain`, without a null label."""
    vae_file = small.write_vae(folder)
    vae = load_vae("f4d4-tiny", vae_file)
    model, ema = random_sit(1).state_dict(), random_sit(2).state_dict()
    args = dict(model="SiT-T/2", num_classes=CLASSES, path_type="linear", vae="f4d4-tiny", vae_ckpt=str(vae_file))
    ours = {"model": model, "ema": ema, "args": args, "steps": 7, "format": 1}
    joint = {"vae": to_ldm(vae), "vae_config": vae_config(vae)}
    public = {"model": model, "ema": ema, "vae": to_ldm(vae), "steps": 7}
    public |= {name: {} for name in ("discriminator", "opt", "opt_vae", "opt_disc")}
    public["args"] = argparse.Namespace(**args | {"vae_ckpt": "gone.pt"})
    table = "y_embedder.embedding_table.weight"
    runs = {
        "repae": ours | joint,
        "swapped": ours | joint | {"model": ema, "ema": model},
        "public": public,
        "ldm": ours,
        "cosine": ours | {"args": args | {"path_type": "cosine"}},
        "plain": ours | {"ema": ema | {table: ema[table][:CLASSES].clone()}},
    }
    for name, contents in runs.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        torch.save(contents, folder / name / "checkpoints" / "0000007.pt")
    return folder


def flags(exps: Path, folder: Path, run: str = "repae", **options) -> list[str]:
    usual = dict(num_fid_samples=COUNT, pproc_batch_size=BATCH, num_steps=3, cfg_scale=1.5)
    return small.argv(**dict(exp_path=exps / run, sample_dir=folder) | usual | options)


def draw(exps: Path, folder: Path, run: str = "repae", **options) -> SimpleNamespace:
    """The results of one job in a folder of its own: `images` (N, H, W, 3), `labels`, `record`, `npz`, `folder`."""
    generate.main(flags(exps, folder, run, **options))
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    record = json.loads(npz.with_suffix(".json").read_text())
    return SimpleNamespace(images=images, labels=labels, record=record, npz=npz, folder=folder)


def interrupt(exps, folder, monkeypatch, after: int, **options) -> None:
    """A job that stops before its batch number `after` is written."""
    write = SampleStore.write

    def write_or_stop(store, batch, images):
        if batch == after:
            raise KeyboardInterrupt
        write(store, batch, images)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(SampleStore, "write", write_or_stop)
        generate.main(flags(exps, folder, **options))


def record_calls(monkeypatch) -> list[int]:
    """The batch size of every evaluation of SiT from now on."""
    seen, forward = [], SiT.forward
    monkeypatch.setattr(SiT, "forward", lambda sit, x, t, y: (seen.append(len(x)), forward(sit, x, t, y))[1])
    return seen


def difference(images, others) -> np.ndarray:
    return np.abs(images.astype(int) - others.astype(int))


def refused(argv: list[str], capsys, *folders: Path) -> str:
    """The one line that generate.py leaves with; asserts code 2 and that no file or folder was touched."""
    before = small.listing(*folders)
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        generate.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2
    assert len(lines) == 1 and ": error: " in lines[0], lines
    assert small.listing(*folders) == before
    return lines[0]
