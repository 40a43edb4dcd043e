"""The labels of a tree of images: by its top folders, or by a `dataset.json`; and which trees are refused.

Nothing here imports torch.
"""

import json
import logging
import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dataset.image_files import ImageTree, folder_of_all, refuse_splits, split_names, walk_images
from utils.errors import InputError, about, printable
from utils.files import read_json

LARGEST_LABEL = 2**31 - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their labels.

    Attributes:
        files: relative to the tree's root, with "/", in sorted order; labels: of each.
        class_names: of label 0, 1, ...; none unless folders name them.
        num_classes: of the whole tree, whether or not these files show all of them.
        tree: what else was found.
    """

    files: list[str]
    labels: list[int]
    class_names: list[str]
    num_classes: int
    tree: ImageTree

    def at_most(self, count: int | None) -> "LabelledImages":
        """`count` of the images, in their order, spread over the classes: of each the first, then the second ..."""
        seen, rank = Counter(), []
        for label in self.labels:
            rank.append(seen[label])
            seen[label] += 1
        chosen = sorted(sorted(range(len(rank)), key=rank.__getitem__)[:count])  # the sort is stable
        files, labels = ([column[i] for i in chosen] for column in (self.files, self.labels))
        return LabelledImages(files, labels, self.class_names, self.num_classes, self.tree)


def list_images(root: Path, output: Path | None = None) -> LabelledImages:
    """The image files below `root` with their labels.

    Labels come from `root/dataset.json` in StyleGAN form, `{"labels": [[path, index], ...]}` (null: all 0), if it is
    there; else from the top folder of each file, in sorted order, of all top folders, whether or not they hold images;
    else, with all files in `root` itself, they are 0. What a user may not expect of them is said.

    Args:
        output: the data folder to be written; in `root` it is no class.
    Raises:
        InputError: no folder, no image, parts of a data set in the place of classes, or labels that do not fit the
            files.
    """
    with about("--imagenet-path"):
        if not root.is_dir():
            raise InputError(f"{root} is not a folder; a folder tree of images is needed")
        tree = walk_images(root, output)

    # Labels by a file.
    files = tree.files
    if (root / "dataset.json").is_file():
        labels = _labels_from_json(root / "dataset.json", files)
        if labels is not None:
            tree.left_out -= Counter({".json": 1})  # this one was read
            num_classes = max(labels) + 1
            if empty := empty_classes(labels, num_classes):
                span = f"labels run from {min(labels)} to {max(labels)}"
                which = f"{some(empty['first'])} (empty classes: {empty['count']})"
                logger.warning("%s: %s, and no image has %s", root / "dataset.json", span, which)
            return LabelledImages(files, labels, [], num_classes, tree)

    # None, or by the top folders.
    loose = [name for name in files if "/" not in name]
    if len(loose) == len(files):
        return LabelledImages(files, [0] * len(files), [], 1, tree)
    if loose:
        found = f"{len(loose)} images lie beside the class folders in {root} (first: {loose[0]})"
        raise InputError(f"--imagenet-path: {found}; either all or none may")
    with about("--imagenet-path"):
        refuse_splits(tree, labelled=True)
    _say_what_is_odd(tree)
    index = {name: i for i, name in enumerate(tree.folders)}
    labels = [index[name.split("/", 1)[0]] for name in files]
    return LabelledImages(files, labels, tree.folders, len(tree.folders), tree)


def _say_what_is_odd(tree: ImageTree) -> None:
    """Warn of class folders that may not be what they seem."""
    names, holding = tree.folders, {name.split("/", 1)[0] for name in tree.files}
    if empty := [name for name in names if name not in holding]:
        which = f"{some(empty)} ({len(empty)} of {len(names)} class folders)"
        logger.warning("%s: no image in %s; every class keeps its label", tree.root, which)

    # Numbers: "10" comes before "2".
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in names]
    if all(numbered) and len({match[1] for match in numbered}) == 1:
        numbers = [int(match[2]) for match in numbered]
        if numbers != sorted(numbers):
            order = f"{some(names)}: the order of text, as ADM and torchvision have it, not that of numbers"
            logger.warning("%s: classes are labelled in the order %s", tree.root, order)

    # One class, with folders in it: perhaps those are the classes.
    if only := folder_of_all(tree.files):
        below = [name[len(only) + 1 :] for name in tree.files]
        inner = {name.split("/", 1)[0] for name in below if "/" in name}
        if len(inner) > 1:
            what = f"all images are of one class, {some([only.split('/')[0]])}; its {len(inner)} folders are no classes"
            logger.warning("%s: %s: for those give %s", tree.root, what, tree.root / only)
    if len(parts := split_names(names)) > 1:
        logger.warning("%s: %s are taken as classes, like the folders beside them", tree.root, some(parts))


def some(names: list) -> str:
    """The first few of a list, in words."""
    return ", ".join(printable(str(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def empty_classes(labels: list[int], num_classes: int) -> dict | None:
    """Labels below `num_classes` that no image has: {"count": how many, "first": up to 100}; None if there is none."""
    present = set(labels)
    first = list(islice((label for label in range(num_classes) if label not in present), 100))
    return {"count": num_classes - len(present), "first": first} if first else None


def _labels_from_json(path: Path, files: list[str]) -> list[int] | None:
    """Labels of `files`; None if the JSON is not in StyleGAN form."""
    info = read_json(path)
    if not isinstance(info, dict) or "labels" not in info:
        logger.warning("%s has no 'labels' and is ignored; classes are the top folders", path)
        return None
    if info["labels"] is None:
        return [0] * len(files)

    # File name -> label, each entry in form.
    form = f'{path}: {{"labels": [[path, index], ...]}} with whole numbers >= 0 is needed'
    labels = {}
    for entry in info["labels"] if isinstance(info["labels"], list) else [None]:
        match entry:
            case [str(name), int(label)] if 0 <= label <= LARGEST_LABEL and not isinstance(label, bool):
                name = posixpath.normpath(name.replace("\\", "/"))
                if labels.setdefault(name, label) != label:
                    raise InputError(f"{path}: {name} has two labels, {labels[name]} and {label}")
            case _:
                raise InputError(f"{form}, not {json.dumps(entry)[:80]}")

    # Every image and nothing else.
    missing = sorted(labels.keys() - set(files))
    if missing:
        strangers = f"{len(missing)} files that are no images in {path.parent}"
        raise InputError(f"{path}: labels {strangers} (first: {missing[0]})")
    unlabelled = [name for name in files if name not in labels]
    if unlabelled:
        raise InputError(f"{path}: {len(unlabelled)} of {len(files)} images have no label (first: {unlabelled[0]})")
    return [labels[name] for name in files]
