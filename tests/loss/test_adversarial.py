"""The adversarial loss: hinge, schedule, and LeCam's running means."""

import pytest
import torch

from loss.adversarial import DiscriminatorLoss, adversarial_factor, hinge_loss
from loss.config import VAELossConfig


def test_the_hinge_counts_only_logits_within_the_margin():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert hinge_loss(torch.full((3,), 1.0), torch.full((3,), -1.0)).item() == 0.0


def test_the_adversarial_loss_starts_at_its_step():
    config = VAELossConfig(discriminator_start=10, discriminator_factor=0.5)
    assert [adversarial_factor(config, step) for step in (0, 9, 10, 11)] == [0.0, 0.0, 0.5, 0.5]


def test_lecam_buffers_survive_a_checkpoint():
    config = VAELossConfig(lecam_regularization_weight=1.0, lecam_ema_decay=0.5)
    first = DiscriminatorLoss(config)
    first(torch.full((2,), 3.0), torch.full((2,), -1.0), 0)
    assert first.state_dict() == {"real_logits_mean": torch.tensor([1.5]), "fake_logits_mean": torch.tensor([-0.5])}
    second = DiscriminatorLoss(config)
    second.load_state_dict(first.state_dict())
    _, terms = second(torch.full((2,), 3.0), torch.full((2,), -1.0), 1)
    assert terms["lecam_loss"].item() == (3.0 + 0.5) ** 2 + (1.5 + 1.0) ** 2


def test_logits_that_are_not_finite_do_not_move_lecams_means():
    loss = DiscriminatorLoss(VAELossConfig(lecam_regularization_weight=1.0, lecam_ema_decay=0.5))
    loss(torch.full((2,), 3.0), torch.full((2,), -1.0), 0)
    loss(torch.tensor([float("nan"), 1.0]), torch.full((2,), float("-inf")), 1)
    assert loss.state_dict() == {"real_logits_mean": torch.tensor([1.5]), "fake_logits_mean": torch.tensor([-0.5])}
