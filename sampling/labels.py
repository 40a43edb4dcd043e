"""The label of every sample: drawn, in turn, or read from a file."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.rng import sample_labels


@dataclass(frozen=True)
class LabelScheme:
    """The label of every sample, which depends on the sample's own number and the seed alone.

    Attributes:
        name: "random": a uniform draw from `classes`; "equal": all of `classes` in turn; "file": `classes` is the list.
        classes: int64 (K,).
    """

    name: str
    classes: np.ndarray
    seed: int

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of these sample numbers."""
        if self.name == "random":
            return torch.from_numpy(self.classes)[sample_labels(self.seed, indices, len(self.classes))]
        # A file may end before the last batch, which is filled up, does.
        return torch.from_numpy(self.classes[np.asarray(indices) % len(self.classes)])


def label_scheme(args: argparse.Namespace, num_classes: int) -> LabelScheme:
    """What --label-file, --classes, --num-classes and --label-sampling ask for, of a model with these classes.

    Raises:
        InputError: classes that the model lacks, a class named twice, a count that `equal` cannot divide, a bad file.
    """
    name, flag, classes = args.label_sampling, "--num-classes", np.arange(args.num_classes or num_classes)
    if args.classes is not None:
        flag, classes = "--classes", _listed(args.classes)
    if args.label_file is not None:
        name, flag, classes = "file", "--label-file", read_labels(args.label_file, args.num_fid_samples)

    if name == "equal" and args.num_fid_samples % len(classes):
        raise InputError(
            f"--label-sampling equal: {args.num_fid_samples} samples (--num-fid-samples) do not divide by "
            f"{len(classes)} classes; --classes names fewer"
        )
    if classes.max() >= num_classes:
        raise InputError(f"{flag}: class {classes.max()} was asked for; this model has classes 0..{num_classes - 1}")
    return LabelScheme(name, classes, args.global_seed)


def _listed(text: str) -> np.ndarray:
    """The classes of --classes, int64 (K,)."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--classes: {text!r} was given; whole numbers between commas are needed")
    classes = np.array([int(part) for part in parts])
    if len(set(classes)) < len(classes):
        raise InputError(f"--classes: {text} names a class twice")
    return classes


def read_labels(path: str, count: int) -> np.ndarray:
    """Labels int64 (>= count,) of the samples 0, 1, ... from a `.npy` file, or a text file with one number a line.

    Raises:
        InputError: unreadable, too short, or no whole numbers >= 0.
    """
    try:
        if path.endswith(".npy"):
            labels = np.lib.format.open_memmap(path, mode="r")
        else:
            labels = np.array(Path(path).read_text().split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"--label-file: {path} cannot be read as labels ({error})") from None
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not whole or len(labels) < count or labels.astype(np.int64).min() < 0:
        raise InputError(
            f"--label-file: {path} holds {labels.dtype} of shape {labels.shape}; at least {count} (the "
            "--num-fid-samples) whole numbers >= 0 are needed"
        )
    return labels.astype(np.int64)
