"""The velocity loss of the golden outputs."""

import pytest
import torch
import torch.nn.functional as F

from loss.velocity import direction_loss, velocity_loss
from models.interpolant import interpolate
from tests.support import golden_lightning
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


@pytest.mark.parametrize("variant", ["published", "uniform", "lognorm_mse"])
def test_losses_and_gradients_are_those_of_lightningdit(variant):
    """With time and velocity turned: its loss is the same number as ours."""
    arrays, meta = load("options/ldit_loss")
    settings = meta["variants"][variant]
    sit = golden_lightning.build(meta)
    data, noise = (torch.from_numpy(arrays[f"in.{key}"]) for key in ("data", "noise"))
    theirs = torch.from_numpy(arrays[f"{variant}.t"])
    x_t, target = interpolate(data, noise, 1 - theirs, "linear")
    close(x_t, arrays[f"{variant}.x_t"], 1e-5, 1e-7)
    pred = sit(x_t, theirs, torch.tensor(settings.get("labels_after_drop", arrays["in.y"])))[0]
    close(pred, arrays[f"{variant}.pred"], 1e-5, 1e-7)
    loss = velocity_loss(-pred, target)
    close(loss, arrays[f"{variant}.loss"], 1e-5, 1e-7)
    total = loss.mean()
    if settings["use_cosine_loss"]:
        direction = direction_loss(-pred, target)
        close(direction, arrays[f"{variant}.cos_loss"], 1e-5, 1e-7)
        total = total + direction.mean()
    close(total, arrays[f"{variant}.total"], 1e-5, 1e-7)

    total.backward()
    gradients = {key: parameter.grad for key, parameter in sit.named_parameters() if parameter.grad is not None}
    for key, norm in settings["grad_l2"].items():
        if norm is not None:
            close(gradients[key].double().norm(), norm, 1e-5, 1e-7, key)
            if (stored := f"{variant}.grad.{key}") in arrays:
                close(gradients[key], arrays[stored], 1e-5, 1e-7, key)


def test_time_target_and_velocity_of_lightningdit_are_ours_turned():
    arrays, _ = load("options/ldit_loss")
    data, noise, theirs = (torch.from_numpy(arrays[key]) for key in ("in.data", "in.noise", "conv.t"))
    assert torch.equal(1 - theirs, torch.from_numpy(arrays["conv.ours.t"]))
    x_t, target = interpolate(data, noise, 1 - theirs, "linear")
    close(x_t, arrays["conv.x_t"], 1e-5, 1e-7)
    close(target, arrays["conv.ours.target"], 1e-5, 1e-7)
    close(-target, arrays["conv.target"], 1e-5, 1e-7)
    close(-torch.from_numpy(arrays["conv.velocity"]), arrays["conv.ours.velocity"], 0)


def test_directions_with_vectors_of_length_zero_are_those_of_lightningdit():
    arrays, _ = load("options/ldit_loss")
    pred, target = (torch.from_numpy(arrays[f"cos.{key}"]) for key in ("pred", "target"))
    close(direction_loss(pred, target), arrays["cos.cos_loss"], 1e-5, 1e-7)
    close(velocity_loss(pred, target), arrays["cos.loss"], 1e-5, 1e-7)
    assert direction_loss(torch.zeros_like(pred), target).tolist() == pytest.approx([1, 1])
