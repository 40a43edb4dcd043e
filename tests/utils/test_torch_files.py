"""Checkpoint files: the numbers that were saved, or one line; of classes, argparse.Namespace alone is unpickled."""

import warnings
import zipfile
from types import SimpleNamespace

import pytest
import torch

from tests.support.refusals import refusal
from utils.checkpoint import read_checkpoint
from utils.torch_files import read_torch_file


def compress(source, target):
    """The same archive, as a program that packs files writes it."""
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))


def test_a_file_with_compressed_members_has_its_numbers_and_an_ordinary_one_is_mapped(tmp_path, monkeypatch):
    mapped, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: mapped.append(options["mmap"]) or load(*args, **options)
    )
    torch.save({"model": {"w": torch.arange(64.0)}, "ema": {}, "args": {}}, tmp_path / "x.pt")
    compress(tmp_path / "x.pt", tmp_path / "packed.pt")
    for name in ("x.pt", "packed.pt"):
        assert torch.equal(read_checkpoint(tmp_path / name)["model"]["w"], torch.arange(64.0))
    assert mapped == [True, False]


def test_a_damaged_archive_and_another_pickle_protocol_are_said(tmp_path):
    torch.save({"w": torch.arange(64.0)}, tmp_path / "x.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:300])
    assert "cut.pt is truncated or no torch checkpoint (BadZipFile)" in refusal(read_torch_file, tmp_path / "cut.pt")
    torch.save({"w": torch.arange(64.0)}, tmp_path / "x.pt", pickle_protocol=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(read_torch_file, tmp_path / "x.pt")
    assert message.endswith("x.pt has pickle protocol 4; torch.save's own, 2, is needed")


def test_public_arguments_are_the_one_class_that_is_allowed(tmp_path):
    """argparse.Namespace loads and becomes a dict; a subclass of it by another name does not."""
    from argparse import Namespace

    torch.save({"model": {}, "ema": {}, "args": Namespace(seed=3)}, tmp_path / "public.pt")
    assert read_checkpoint(tmp_path / "public.pt")["args"] == {"seed": 3}
    torch.save({"model": {}, "ema": {}, "args": SimpleNamespace(seed=3)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"types\.SimpleNamespace"):
        read_checkpoint(tmp_path / "foreign.pt")
