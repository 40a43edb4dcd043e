"""Images to evaluate on: every kind of source reads the same ones, also shared among processes."""

import itertools
import json

import numpy as np
import torch
from PIL import Image

from dataset.data import evenly_spaced
from dataset.image_sources import Subset, open_images, read_batches
from tests.support.evaluation_data import as_images, random_images


def test_every_source_reads_the_same_images(tmp_path):
    real = random_images(120, 8, 1)
    (tmp_path / "folder/a").mkdir(parents=True)
    for i, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / f"folder/a/{i:04d}.png")
    (tmp_path / "folder/.hidden.png").write_bytes(b"")
    np.savez(tmp_path / "plain.npz", arr_0=real)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=real)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/images.npy", np.ascontiguousarray(real.transpose(0, 3, 1, 2)))
    np.save(tmp_path / "data/labels.npy", np.zeros(120, np.int64))
    (tmp_path / "data/dataset.json").write_text(json.dumps({"resolution": 8, "count": 120}))
    for name in ("folder", "plain.npz", "compressed.npz", "data"):
        source = open_images(tmp_path / name)
        assert source.size == (8, 8)
        shares = [list(read_batches(source, 16, rank=rank, world_size=3)) for rank in range(3)]
        indices, images = (torch.cat(parts) for parts in zip(*itertools.chain(*shares), strict=True))
        order = indices.argsort()
        assert torch.equal(indices[order], torch.arange(120))
        assert torch.equal(images[order], as_images(real)), name
        some = Subset(source, evenly_spaced(120, 7))
        assert torch.equal(some.read(2, 5), as_images(real)[[34, 51, 68]])
