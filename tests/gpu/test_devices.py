"""Which tests see a card: those marked `gpu`, where nothing else was asked for, and no others."""

import os
from types import SimpleNamespace

import pytest
import torch

import tests.conftest
from tests.support import small


def test_an_ordinary_test_sees_no_card():
    """Nor does a process that it starts."""
    assert not torch.cuda.is_available()
    seen = small.run_python("-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))").stdout
    assert seen.strip() == "''"


@pytest.mark.parametrize(
    ("chosen", "visible"), [("gpu", "0,1"), ("not slow and not gpu", ""), ("slow", ""), ("slow or gpu", ""), ("", "")]
)
def test_cards_are_shown_to_the_acceptance_suite_alone(chosen, visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    tests.conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=chosen)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
