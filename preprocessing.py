"""A folder of images -> the data folder of the training scripts: images.npy, labels.npy, dataset.json.

    python preprocessing.py --imagenet-path /PATH/TO/IMAGENET_TRAIN
    python preprocessing.py --imagenet-path photos --output-path data/photos --resolution 128 --on-error stop

Classes are the top folders in sorted order, also those without an image, or the labels of a StyleGAN-form dataset.json,
or one class for images that lie in the folder itself.
"""

from configs.arguments import preprocessing_parser

if __name__ == "__main__":  # --help and a mistyped flag answer before the heavy imports
    preprocessing_parser().answer_before_imports()

import contextlib
import io
import logging
import sys
import time
from pathlib import Path

from dataset.class_labels import LabelledImages, empty_classes, list_images, some
from dataset.preprocess import STAYS, check_output, write_data_folder
from utils.errors import InputError, command, printable, when_interrupted
from utils.files import read_object


@command
def main(argv=None):
    args = preprocessing_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    root, output = Path(args.imagenet_path), Path(args.output_path)
    started = time.perf_counter()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names are bytes: what cannot be encoded is no error

    # Which files, and their labels; then the data folder, which appears whole or not at all.
    check_output(output, root, args.overwrite)
    found = list_images(root, output)
    images = found.at_most(args.max_images)
    with when_interrupted(lambda: f"interrupted; {STAYS}"):
        info = write_data_folder(
            output,
            images,
            resolution=args.resolution,
            num_workers=args.num_workers,
            overwrite=args.overwrite,
            stop_on_error=args.on_error == "stop",
            exif_orientation=args.exif_orientation,
        )
    report(found, info, output)

    # What came of it.
    if args.overwrite:
        for name in orphaned_latents(output):
            print(f"latents '{name}' in {output} belong to other images: cache them again, or delete them")
    left_out = f", {images.tree.left_out_text()} left out" if images.tree.left_out else ""
    print(
        f"{info['count']} images of {args.resolution} x {args.resolution}, {images.num_classes} classes, "
        f"{len(info['skipped'])} skipped{left_out}, {time.perf_counter() - started:.1f} s: {output}"
    )


def report(found: LabelledImages, info: dict, output: Path) -> None:
    """Say what a user may not expect of the data folder and `list_images` could not know."""
    for entry in info["skipped"][:10]:
        print(f"skipped {printable(entry['file'])}: {entry['reason']}", file=sys.stderr)
    if len(info["skipped"]) > 10:
        print(f"... and {len(info['skipped']) - 10} more, listed in {output / 'dataset.json'}", file=sys.stderr)
    before = empty_classes(found.labels, found.num_classes) or {"count": 0}
    if (empty := info.get("empty_classes", before))["count"] > before["count"]:
        which = [found.class_names[label] if found.class_names else label for label in empty["first"]]
        count = f"{empty['count']} of {found.num_classes} classes"
        print(f"{count} have no image in {output}: {some(which)}", file=sys.stderr)
    if info.get("exif_turns") and not info["exif_orientation"]:
        advice = "they stay as they lie (--exif-orientation turns them)"
        print(f"{info['exif_turns']} images ask by EXIF to be turned: {advice}", file=sys.stderr)


def orphaned_latents(output: Path) -> list[str]:
    """Names of the cached latents in a data folder that belong to the images that were there before."""
    caches = {}
    for path in sorted(output.glob("*.json")):
        with contextlib.suppress(InputError):  # somebody's own file
            info = read_object(path)
            if "dataset_fingerprint" in info:
                caches[path.stem] = info["dataset_fingerprint"]
    if not caches:
        return []
    from dataset.data import ImageData  # imports torch, which nothing else here needs

    fingerprint = ImageData(output).fingerprint
    return [name for name, of in caches.items() if of != fingerprint]


if __name__ == "__main__":
    main()
