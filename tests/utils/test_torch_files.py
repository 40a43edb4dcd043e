"""Checkpoint files: of classes, argparse.Namespace alone is unpickled."""

from types import SimpleNamespace

import pytest
import torch

from utils.checkpoint import read_checkpoint


def test_public_arguments_are_the_one_class_that_is_allowed(tmp_path):
    """argparse.Namespace loads and becomes a dict; a subclass of it by another name does not."""
    from argparse import Namespace

    torch.save({"model": {}, "ema": {}, "args": Namespace(seed=3)}, tmp_path / "public.pt")
    assert read_checkpoint(tmp_path / "public.pt")["args"] == {"seed": 3}
    torch.save({"model": {}, "ema": {}, "args": SimpleNamespace(seed=3)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"types\.SimpleNamespace"):
        read_checkpoint(tmp_path / "foreign.pt")
