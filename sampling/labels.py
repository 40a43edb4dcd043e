"""The label of every sample: drawn, in turn, or read from a file."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.classes import classes_of
from utils.errors import InputError, about
from utils.npz import open_npy
from utils.rng import sample_labels


@dataclass(frozen=True)
class LabelScheme:
    """The label of every sample, which depends on the sample's own number and the seed alone.

    Attributes:
        name: "random": a uniform draw from `classes`; "equal": all of `classes` in turn; "file": `classes` is the list;
            "null": the null label, `classes`' only one.
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


def seen_classes(train_args: Mapping, num_classes: int) -> np.ndarray:
    """The classes int64 (K,) that a run saw, as its args record them; all of the model's where they do not.

    Raises:
        InputError: what is recorded is no list of the model's classes.
    """
    recorded = train_args.get("seen_classes")
    if recorded is None:
        return np.arange(num_classes)
    try:
        return classes_of(str(recorded), num_classes)
    except ValueError as error:
        raise InputError(f"the run's args name the classes that it saw as {recorded!r} ({error})") from None


def label_scheme(
    args: argparse.Namespace, num_classes: int, *, seen: np.ndarray | None = None, null_label: int | None = None
) -> LabelScheme:
    """What --label-file, --classes, --num-classes and --label-sampling ask for, of a model with these classes.

    Args:
        seen: the classes that are drawn from by default (all of them).
        null_label: of the unconditional network, which `--classes null` asks for; None: the model has none.

    Raises:
        InputError: classes that the model lacks, a class named twice, a count that `equal` cannot divide, a bad file.
    """
    if args.classes == "null":
        return LabelScheme("null", np.array([_null_label(args, null_label)]), args.global_seed)
    name, flag, classes = args.label_sampling, "--num-classes", np.arange(num_classes) if seen is None else seen
    if args.num_classes is not None:
        classes = np.arange(args.num_classes)
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


def _null_label(args: argparse.Namespace, null_label: int | None) -> int:
    if null_label is None:
        raise InputError("--classes null: this model was trained without label dropping and has no null label")
    if args.cfg_scale != 1:
        unchanged = "guidance does not change the unconditional network"
        raise InputError(f"--cfg-scale: {args.cfg_scale} was given; {unchanged}: --classes null needs 1")
    return null_label


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
    with about("--label-file"):
        labels = open_npy(path) if path.endswith(".npy") else _numbers(path)
    whole = labels.ndim == 1 and labels.dtype.kind in "iu"
    if not whole or len(labels) < count or labels.astype(np.int64).min() < 0:
        raise InputError(
            f"--label-file: {path} holds {labels.dtype} of shape {labels.shape}; at least {count} (the "
            "--num-fid-samples) whole numbers >= 0 are needed"
        )
    return labels.astype(np.int64)


def _numbers(path: str) -> np.ndarray:
    try:
        return np.array(Path(path).read_text().split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as labels ({error})") from None
