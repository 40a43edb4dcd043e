"""Images: any file's pixels to RGB squares, uint8 <-> [-1, 1], grids and PNG.

Nothing here imports torch: tensors are only asked for their own methods, and preprocessing.py starts at once.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    Alpha and palette transparency are dropped, not blended, as `convert("RGB")` of the public code does: colours
    under transparent pixels appear. 16-bit grey (modes I;16 and I) is scaled to 8 bits, where `convert` would clip
    almost everything to white. Mode F has no range of its own; its values count as levels 0..255.
    """
    if image.mode.startswith("I") or image.mode == "F":
        largest, levels = (255, np.asarray(image)) if image.mode == "F" else (65535, np.asarray(image))
        rows = (np.nan_to_num(row).clip(0, largest) * (255 / largest) for row in levels)  # as a whole it is float64
        image = Image.fromarray(np.stack([np.rint(row).astype(np.uint8) for row in rows]))
    return image if image.mode == "RGB" else image.convert("RGB")  # a large image is not copied for nothing


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and cut out the central square, as in ADM.

    Args:
        image: mode RGB.
        size: side of the square.
    Returns:
        uint8 (size, size, 3).
    Raises:
        ValueError: the image is so elongated that scaling it would take more pixels than Pillow accepts in a file.
    Source: `center_crop_arr` of openai/guided-diffusion; byte for byte under equal Pillow versions.
    """
    # Halving by box filter first: one bicubic step by a large factor would alias.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > max(Image.MAX_IMAGE_PIXELS, size * size):
        raise ValueError(f"too elongated: {image.width} x {image.height} would become {width} x {height}")
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def to_signed(images: Tensor) -> Tensor:
    """Images uint8 0..255 -> pixels float32 [-1, 1], of the same shape."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels float [-1, 1] -> images uint8, of the same shape: clamped, then truncated, as in the public code.

    Truncation makes `to_uint8(to_signed(images))` differ from `images` by up to one level.
    """
    return ((pixels.float() + 1) / 2 * 255).clamp(0, 255).byte()


def image_grid(images: Tensor | np.ndarray, columns: int) -> np.ndarray:
    """Tile images row by row; cells left over are black.

    Args:
        images: uint8 (N, 3, H, W), on any device.
        columns: images in a row.
    Returns:
        uint8 (rows * H, columns * W, 3).
    """
    images = images if isinstance(images, np.ndarray) else images.detach().cpu().numpy()
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, channels, height, width), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)  # rows, H, columns, W, 3
    return cells.reshape(rows * height, columns * width, channels)


def save_png(image: np.ndarray, path: str | os.PathLike) -> None:
    """Write uint8 (H, W, 3) or (H, W) as PNG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
