"""The alignment loss of the golden projections."""

import pytest
import torch

from loss.alignment import alignment_loss
from tests.support.golden_data import close, load


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_alignment_is_that_of_the_public_code(name, path):
    arrays, meta = load(name)
    encoders = range(len(meta["config"]["z_dims"]))
    projections = [torch.from_numpy(arrays[f"train.{path}.zs_tilde.{i}"]) for i in encoders]
    targets = [torch.from_numpy(arrays[f"in.zs.{i}"]) for i in encoders]
    close(alignment_loss(projections, targets), arrays[f"train.{path}.proj_loss"], 1e-5, 1e-7)
