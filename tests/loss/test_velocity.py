"""The velocity loss of the golden outputs."""

import pytest
import torch
import torch.nn.functional as F

from loss.velocity import velocity_loss
from models.interpolant import interpolate
from tests.support.golden_data import close, load


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_velocity_loss_is_that_of_the_public_code(name, path):
    arrays, _ = load(name)
    z, noise, t = (torch.from_numpy(arrays[f"in.{key}"]) for key in ("z", "noises", "time_input"))
    x_0 = F.batch_norm(z, None, None, training=True, eps=1e-4)
    _, target = interpolate(x_0, noise, t.flatten(), path)
    velocity = torch.from_numpy(arrays[f"train.{path}.model_output"])
    close(velocity_loss(velocity, target), arrays[f"train.{path}.denoising_loss"], 1e-5, 1e-7)
