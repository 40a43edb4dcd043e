"""How the costs of a job read: FLOPs by part, memory, and time on the cards of `utils.cards`, as lines of text."""

from collections.abc import Mapping, Sequence

import torch

from utils.cards import peak_flops
from utils.parts import Part

CARDS = ("H100", "A100")
MFUS = (0.10, 0.20, 0.30, 0.45)  # of published trainers of this kind, and what this one is after


def flops_lines(flops: Mapping[Part, float], unit: str) -> list[str]:
    """A table of the parts' forward and backward FLOPs.

    Args:
        flops: by part, of one `unit`, such as "image".
    """
    total, passes = sum(flops.values()), sorted({part.backward for part in flops})
    rows = [(f"GFLOP of one {unit}", *(("forward", "backward")[backward] for backward in passes), "share")]
    for name in dict.fromkeys(part.name for part in flops):
        values = [flops.get(Part(name, backward), 0) for backward in passes]
        rows.append((name, *map(_gflop, values), f"{sum(values) / total:.1%}"))
    sums = [sum(value for part, value in flops.items() if part.backward == backward) for backward in passes]
    return aligned([*rows, ("together", *map(_gflop, sums), _gflop(total))])


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f}" if flops else ""


def memory_lines(peak: Mapping[str, float]) -> list[str]:
    """GiB by kind and together, and the card that is here, if there is one."""
    rows = [("GiB of a process", "")] + [(kind, f"{size / 2**30:.2f}") for kind, size in peak.items() if size]
    rows.append(("together", f"{sum(peak.values()) / 2**30:.2f}"))
    lines = aligned(rows)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        lines.append(f"the card here, {card.name}, has {card.total_memory / 2**30:.1f} GiB")
    return lines


def time_lines(flops: float, processes: int, *, half: bool, tf32: bool, unit: str) -> list[str]:
    """A table of the time that a job takes, by card and MFU.

    Args:
        flops: of the whole job.
        half, tf32: as `utils.cards.peak_flops` takes them.
        unit: "days" or "hours".
    """
    seconds = {"days": 86400, "hours": 3600}[unit]
    cards = f"{processes} card{'s' if processes > 1 else ''}"
    rows = [(f"{unit} on {cards}, by MFU", *(f"{mfu:.0%}" for mfu in MFUS))]
    for card in CARDS:
        peak = processes * peak_flops(card, half=half, tf32=tf32)
        rows.append((card, *(f"{flops / (peak * mfu * seconds):,.3g}" for mfu in MFUS)))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def gb(size: float) -> str:
    """A size on disk."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
