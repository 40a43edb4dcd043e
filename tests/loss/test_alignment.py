"""The alignment loss of the golden projections."""

import pytest
import torch

from loss.alignment import alignment_loss, normalize_spatially
from tests.support.golden_data import close, load


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["sit_a", "sit_b"])
def test_alignment_is_that_of_the_public_code(name, path):
    arrays, meta = load(name)
    encoders = range(len(meta["config"]["z_dims"]))
    projections = [torch.from_numpy(arrays[f"train.{path}.zs_tilde.{i}"]) for i in encoders]
    targets = [torch.from_numpy(arrays[f"in.zs.{i}"]) for i in encoders]
    close(alignment_loss(projections, targets), arrays[f"train.{path}.proj_loss"], 1e-5, 1e-7)


def test_spatial_norm_is_that_of_irepa():
    arrays, meta = load("options/irepa")
    for case in meta["spnorm"]:
        tokens = torch.from_numpy(arrays["spnorm.in"]).requires_grad_()
        out = normalize_spatially(tokens, case["alpha"])
        (out * torch.from_numpy(arrays["spnorm.weight"])).sum().backward()
        close(out, arrays[f"{case['name']}.out"], 1e-5, 1e-7, case["name"])
        close(tokens.grad, arrays[f"{case['name']}.grad_in"], 1e-5, 1e-7, case["name"])
    close(normalize_spatially(tokens, 1.0), arrays["spnorm.default.out"], 1e-5, 1e-7)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_channels_that_are_constant_over_space_are_divided_by_what_irepa_adds(alpha):
    arrays, _ = load("options/irepa")
    out = normalize_spatially(torch.from_numpy(arrays["spnorm.edge.in"]), alpha).numpy()
    assert out == pytest.approx(arrays[f"spnorm.edge.alpha{alpha}.out"], rel=1e-4, abs=1e-7)


def test_tokens_of_half_precision_are_normalised_in_float32():
    tokens = torch.randn(2, 9, 4).bfloat16()
    assert torch.equal(normalize_spatially(tokens, 0.6), normalize_spatially(tokens.float(), 0.6))
