"""Write scikit-learn's 1,797 handwritten digits as a folder of PNG classes: <out>/0/0000.png ... <out>/9/1796.png.

The scans are 8 x 8 with 17 grey levels (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
machine learning repository, 1998). They are enlarged to 24 x 24, and a contrast curve gives the strokes an edge: dark
ink on white paper. The data come with the scikit-learn package; nothing is downloaded.

    python -m examples.digits.make_images --out build/digits/images
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import InputError, command

SIZE = 24
CONTRAST = (0.3, 0.9)  # ink below the first is paper, above the second is black


def enlarge(digit: np.ndarray) -> Image.Image:
    """One scan as an image.

    Args:
        digit: (8, 8), ink from 0 to 16.

    Returns:
        RGB image, 24 x 24, black on white.
    """
    ink = Image.fromarray(np.pad(digit / 16, 1).astype(np.float32))  # one pixel of margin: some strokes touch the edge
    ink = np.asarray(ink.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    low, high = CONTRAST
    ink = np.clip((ink - low) / (high - low), 0, 1)
    ink = ink * ink * (3 - 2 * ink)  # smoothstep
    return Image.fromarray(np.rint(255 * (1 - ink)).astype(np.uint8)).convert("RGB")


def write_images(out: Path) -> int:
    """Write the folder tree below `out` and return the number of images; the name holds the number in the data set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        (out / str(label)).mkdir(parents=True, exist_ok=True)
    for i, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        enlarge(digit).save(out / str(label) / f"{i:04d}.png")
    return len(digits.images)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/digits/images"), help="folder to write")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out: {args.out} is a file; a folder is needed")
    print(f"{write_images(args.out)} digits of {SIZE} x {SIZE} in {args.out}/0 ... {args.out}/9")


if __name__ == "__main__":
    main()
