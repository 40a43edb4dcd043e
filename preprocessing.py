"""A folder of images -> the data folder of the training scripts: images.npy, labels.npy, dataset.json.

    python preprocessing.py --imagenet-path /PATH/TO/IMAGENET_TRAIN
    python preprocessing.py --imagenet-path photos --output-path data/photos --resolution 128 --on-error stop

Classes are the top folders in sorted order, or the labels of a StyleGAN-form dataset.json, or one class for images
that lie in the folder itself.
"""

from configs.arguments import preprocessing_parser

if __name__ == "__main__":  # --help and a mistyped flag answer before the heavy imports
    preprocessing_parser().answer_before_imports()

import contextlib
import json
import logging
import signal
import sys
import time
from pathlib import Path

from dataset.preprocess import check_output, list_images, write_data_folder
from utils.errors import command, when_interrupted


@command
def main(argv=None):
    args = preprocessing_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    root, output = Path(args.imagenet_path), Path(args.output_path)
    started = time.perf_counter()

    # Which files, and their labels; then the data folder, which appears whole or not at all.
    check_output(output, root, args.overwrite)
    files, labels, class_names = list_images(root)
    files, labels = files[: args.max_images], labels[: args.max_images]
    with when_interrupted(lambda: "interrupted; nothing was written"):
        skipped = write_data_folder(
            output,
            root,
            files,
            labels,
            class_names,
            resolution=args.resolution,
            num_workers=args.num_workers,
            stop_on_error=args.on_error == "stop",
            exif_orientation=args.exif_orientation,
        )

    # What came of it.
    for entry in skipped[:10]:
        print(f"skipped {entry['file']}: {entry['reason']}", file=sys.stderr)
    if len(skipped) > 10:
        print(f"... and {len(skipped) - 10} more, listed in {output / 'dataset.json'}", file=sys.stderr)
    if args.overwrite:
        for name in orphaned_latents(output):
            print(f"latents '{name}' in {output} belong to other images: cache them again, or delete them")
    classes = len(class_names) or max(labels) + 1
    seconds = time.perf_counter() - started
    print(
        f"{len(files) - len(skipped)} images of {args.resolution} x {args.resolution}, {classes} classes, "
        f"{len(skipped)} skipped, {seconds:.1f} s: {output}"
    )


def orphaned_latents(output: Path) -> list[str]:
    """Names of the cached latents in a data folder that belong to the images that were there before."""
    caches = {}
    for path in sorted(output.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # somebody's own file
            info = json.loads(path.read_text())
            if isinstance(info, dict) and "dataset_fingerprint" in info:
                caches[path.stem] = info["dataset_fingerprint"]
    if not caches:
        return []
    from dataset.data import ImageData  # imports torch, which nothing else here needs

    fingerprint = ImageData(output).fingerprint
    return [name for name, of in caches.items() if of != fingerprint]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's "stop" tidies up as Ctrl-C does
    main()
