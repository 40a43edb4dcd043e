"""Which classes a run has, and which of them it sees."""

import argparse

from dataset.classes import class_ranges, classes_of
from dataset.data import ImageData
from utils.errors import InputError


def settle_classes(args: argparse.Namespace, data: ImageData, checkpoint: dict | None) -> list[str]:
    """Give `args.num_classes` its value where the flag was not given, and note the classes that the run sees.

    That is the number of the checkpoint that the run resumes, else the data folder's own. `args.seen_classes` goes into
    args.json and the checkpoint: samples are drawn from these, not from classes that were never trained.

    Returns:
        notes.
    Raises:
        InputError: the data has more classes than the checkpoint.
    """
    if args.num_classes is None:
        earlier = checkpoint and checkpoint["args"].get("num_classes")
        args.num_classes = earlier or data.num_classes
    if (largest := int(data.labels.max())) >= args.num_classes:
        found = f"the largest label in {data.folder} is {largest}"
        raise InputError(f"--data-dir: {found}; the checkpoint was trained with {args.num_classes} classes")
    args.seen_classes = class_ranges(data.labels)
    if len(classes_of(args.seen_classes, args.num_classes)) == args.num_classes:
        return []
    seen = f"the images of {data.folder} have the classes {args.seen_classes}"
    return [f"{seen} of 0-{args.num_classes - 1}: samples are drawn from these alone"]
