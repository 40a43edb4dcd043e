"""What a graphics card can do at most, by its data sheet: the 100 % of an MFU."""

import re

import torch

# Dense (not sparse) FLOP/s of the tensor cores: 16 bits (fp16 and bf16, summed in float32), TF32; and of float32.
PEAKS: dict[str, tuple[float, float, float]] = {
    "B200": (2250e12, 1125e12, 75e12),
    "H200": (989e12, 494e12, 67e12),
    "GH200": (989e12, 494e12, 67e12),
    "H100 NVL": (835e12, 417e12, 60e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H800": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "A800": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "A40": (149.7e12, 74.8e12, 37.4e12),
    "RTX 4090": (165.2e12, 82.6e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12, 35.6e12),
}


def peak_flops(card: str, *, half: bool, tf32: bool) -> float | None:
    """Dense FLOP/s of a card by its data sheet; None where the table does not have it.

    Args:
        card: as `torch.cuda.get_device_name` gives it, such as "NVIDIA H100 80GB HBM3".
        half: whether products are in fp16 or bf16; else they are float32's, with TF32 inside where `tf32`.
    """
    words = card.replace("-", " ")  # NVIDIA A100-SXM4-80GB
    for name in sorted(PEAKS, key=len, reverse=True):  # of two names that fit, the longer says more
        if re.search(rf"\b{name}\b", words):
            sixteen_bits, tf32_peak, float32 = PEAKS[name]
            return sixteen_bits if half else tf32_peak if tf32 else float32
    return None


def card_peak(*, half: bool, tf32: bool) -> float | None:
    """`peak_flops` of the card that is here; None on a CPU."""
    return peak_flops(torch.cuda.get_device_name(), half=half, tf32=tf32) if torch.cuda.is_available() else None
