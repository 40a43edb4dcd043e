"""The optimiser: clipping, and moments that follow the names of their parameters."""

import math

import pytest
import torch

from tests.support import small
from training.optimizer import Optimizer
from utils.checkpoint import write_checkpoint


def test_gradients_are_clipped_and_the_norm_before_is_reported():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = Optimizer(
        [("p", parameter)], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0, scale_loss=False
    )
    optimizer.backward((torch.tensor([3.0, 0.0, 4.0, 0.0]) * parameter).sum())
    assert optimizer.step() == 5 and parameter.grad is None
    moment = optimizer.state_dict()["state"][0]["exp_avg"]  # a tenth of the clipped gradient
    torch.testing.assert_close(moment, torch.tensor([0.06, 0.0, 0.08, 0.0]))


def test_moments_follow_their_names(tmp_path):
    """A checkpoint whose parameters are listed in another order gives each parameter its own moments."""
    parameters = [(name, torch.nn.Parameter(torch.ones(3))) for name in "abc"]
    optimizer = Optimizer(
        parameters, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=9.0, scale_loss=False
    )
    optimizer.backward(sum(weight * p.sum() for weight, (_, p) in enumerate(parameters, start=1)))
    optimizer.step()
    write_checkpoint(tmp_path / "1.pt", {"opt": optimizer.state_dict()})
    saved = torch.load(tmp_path / "1.pt")["opt"]
    turned = Optimizer(
        parameters[::-1], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=9.0, scale_loss=False
    )
    turned.load_state_dict(saved, optimizer.names, "1.pt: opt")
    moments = [turned.state_dict()["state"][index]["exp_avg"][0].item() for index in range(3)]
    assert moments == pytest.approx([0.3, 0.2, 0.1])


@pytest.mark.parametrize("how", ["float32", "float32, fused as on CUDA", "fp16"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_with_a_bad_gradient_might_as_well_not_have_been(bad, how):
    """Parameters, moments and the count of steps are, after a good step more, those of an optimiser that saw none."""
    settings = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    ends = []
    for gradients in ([1.0, bad, 3.0], [1.0, 3.0]):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = Optimizer([("p", parameter)], **settings, scale_loss=how == "fp16")
        optimizer.adamw.param_groups[0]["fused"] = "fused" in how
        for gradient in gradients:
            optimizer.backward((torch.tensor([0.1, 0.2, gradient]) * parameter).sum())
            norm = optimizer.step()
            assert norm.isfinite() == math.isfinite(gradient) and parameter.grad is None
        ends.append((parameter.data, optimizer.state_dict()["state"]))
    small.assert_same(ends[0], ends[1])


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_skips_the_step_of_its_network_alone(overflows):
    """Under fp16: parameters, moments and the scale of the one stay or are halved, the other goes its way."""
    one, other = ([("p", torch.nn.Parameter(torch.ones(3)))] for _ in range(2))
    settings = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=9.0, scale_loss=True)
    opt_one, opt_other = Optimizer(one, **settings), Optimizer(other, **settings)
    scale = opt_one.scaler.get_scale()
    opt_one.backward((one[0][1] * (float("inf") if overflows else 1.0)).sum())
    opt_other.backward(other[0][1].sum())
    norm_one, norm_other = opt_one.step(), opt_other.step()
    assert norm_other.item() == pytest.approx(3**0.5) and opt_other.scaler.get_scale() == scale
    assert (other[0][1] < 1).all()
    assert torch.equal(one[0][1], torch.ones(3)) == overflows and (len(opt_one.state_dict()["state"]) == 0) == overflows
    assert opt_one.scaler.get_scale() == (scale / 2 if overflows else scale) and norm_one.isfinite() != overflows
