"""Helpers for modules: freezing."""

import pytest
import torch

from utils.modules import frozen


def test_frozen_restores_what_was():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise RuntimeError
    assert module.weight.requires_grad and not module.bias.requires_grad
