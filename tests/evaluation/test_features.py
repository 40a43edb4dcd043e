"""The feature spaces that evaluation measures in."""

import numpy as np
import pytest
import torch

from evaluation.features import DINOv2ClassToken, dinov2_positions, exact_float32, load_features
from models import encoders
from models.encoder_table import ENCODERS
from tests.support.encoder_weights import write_public_file
from tests.support.evaluation_data import as_images, encoder_folder, random_images
from utils.errors import InputError

CPU = torch.device("cpu")


def test_images_that_an_encoder_cannot_take_are_said_in_this_scripts_words():
    with pytest.raises(InputError, match="--features: images with a side of 24 was given; encoder mae-vit-l"):
        load_features("mae-vit-l", (24, 24))


def cubic_row(values: torch.Tensor, where: float) -> torch.Tensor:
    """Cubic interpolation (a = -0.75) of a row at one place, edges repeated."""
    first, total = int(np.floor(where)), 0
    for index in range(first - 1, first + 3):
        distance = abs(where - index)
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        total = total + (near if distance <= 1 else far) * values[min(max(index, 0), len(values) - 1)]
    return total


def test_dinov2_positions_follow_the_original_interpolation():
    """Position p of the new grid lies at (p + 0.5) * 37 / 16.1 - 0.5 of the stored one, not at ... * 37 / 16."""
    row = torch.randn(37, generator=torch.Generator().manual_seed(0))
    planes = torch.stack([row.expand(37, 37), row[:, None].expand(37, 37)], dim=-1)
    table = torch.cat([torch.tensor([[[5.0, 6.0]]]), planes.reshape(1, 37 * 37, 2)], dim=1)
    found = dinov2_positions(table, 16)
    assert found.shape == (1, 257, 2) and found[0, 0].tolist() == [5, 6]
    expected = torch.stack([cubic_row(row, (p + 0.5) * 37 / 16.1 - 0.5) for p in range(16)])
    grid = found[0, 1:].unflatten(0, (16, 16))
    torch.testing.assert_close(grid[3, :, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[:, 3, 1], expected, rtol=0, atol=1e-5)


def test_fd_dinov2_takes_the_class_token_at_224(tmp_path, monkeypatch):
    shallow = encoders.build
    monkeypatch.setattr("evaluation.features.build", lambda spec, resolution: shallow(spec, resolution, depth=2))
    file = write_public_file("dinov2-vit-b", tmp_path)
    network = load_features("dinov2-vit-b", (32, 32), weights=file)
    assert isinstance(network, DINOv2ClassToken)
    assert (network.label, network.dim, network.spatial_dim) == ("dinov2-vit-b", ENCODERS["dinov2-vit-b"].width, 0)
    assert network.network.pos_embed.shape == (1, 257, 768)
    images = as_images(random_images(2, 224, 0))
    with exact_float32(CPU):
        found, spatial = network(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        tokens = network.network.forward_features((images / 255 - mean) / std)
    assert spatial is None
    torch.testing.assert_close(found, tokens[:, 0], rtol=0, atol=1e-5)


def test_other_encoders_give_the_mean_of_their_patch_tokens(tmp_path):
    name = encoder_folder(tmp_path / "small")
    state = torch.get_rng_state()
    network = load_features(name, (16, 16))
    assert torch.equal(torch.get_rng_state(), state)
    assert (network.label, network.dim) == ("small-mean-tokens", 12)
    images = as_images(random_images(3, 16, 0))
    tokens = encoders.load_encoder(name, resolution=16)(images)
    torch.testing.assert_close(network(images)[0], tokens.mean(1))


def test_tf32_is_set_and_read_in_one_way_by_all():
    """torch has two ways since 2.9, and reading one raises after some settings by the other.

    Here as a run does it: training, sampling and caching set it, evaluation sets and restores it, and inductor reads it
    the other way (tests of the scripts' --compile show that it then works).
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = cudnn.allow_tf32 = allowed
            with exact_float32(CPU):
                assert not matmul.allow_tf32 and not cudnn.allow_tf32
            assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed
            assert matmul.fp32_precision == ("tf32" if allowed else "ieee")
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
