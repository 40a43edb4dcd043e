"""Classes of a data set as text that fits into a line: "0-999", or "0-3,7"."""

from collections.abc import Iterable

import numpy as np


def class_ranges(labels: Iterable[int]) -> str:
    """The classes that occur among labels, ascending: runs as `first-last`, single ones by themselves."""
    classes = np.unique(np.asarray(labels, np.int64))
    runs = np.split(classes, np.flatnonzero(np.diff(classes) != 1) + 1)
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def classes_of(ranges: str, num_classes: int) -> np.ndarray:
    """The inverse of `class_ranges`: int64 (K,), ascending.

    Raises:
        ValueError: the text is no such list of classes below `num_classes`.
    """
    classes = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        first, last = int(first), int(last or first)
        if not 0 <= first <= last < num_classes:
            raise ValueError(f"{part} is no range of classes below {num_classes}")
        classes += range(first, last + 1)
    return np.array(classes, np.int64)
