"""Which card's peak a name means."""

import pytest

from utils.cards import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("card", "sixteen_bits"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A4000", None),  # not an A40
        ("NVIDIA H20", None),  # not an H200
        ("AMD EPYC", None),
    ],
)
def test_a_card_is_found_by_its_whole_name(card, sixteen_bits):
    assert peak_flops(card, half=True, tf32=True) == sixteen_bits


def test_the_precision_counts():
    peaks = [peak_flops("NVIDIA H100", half=half, tf32=tf32) for half, tf32 in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert peaks == [989e12, 989e12, 494e12, 67e12]
    assert all(half >= 1.9 * tf32 >= 0.9 * float32 for half, tf32, float32 in PEAKS.values())
