"""What the benchmarks share: the clock, memory, a measured peak, and the form of a result.

A benchmark is one command, with real sizes on a GPU and small ones on a CPU, and random weights: speed does not depend
on them. It prints a table, and writes it as `benchmarks/results/<benchmark>-<card>-<date>.json` with the machine it was
measured on.
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cards import peak_flops
from utils.files import write_json
from utils.memory import forget_peak, peak_gib
from utils.provenance import commit, versions

__all__ = ["forget_peak", "peak_gib"]  # read from here by the benchmarks

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A benchmark's parser: its docstring, the device, the threads, the size, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU; default: %(default)s")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="small sizes (default: on a CPU)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result; default: %(default)s")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with `device` as a torch.device, `small` settled, and the number of threads set."""
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    args.small = args.device.type == "cpu" if args.small is None else args.small
    torch.set_num_threads(args.threads)
    return args


# Time


@dataclass(frozen=True)
class Seconds:
    """Of one call: by the clock, and of all the processor's cores together."""

    wall: float
    processor: float

    def best(self, device: torch.device) -> float:
        """What to compare by: on a CPU, which others may use too, the processor's time; on a GPU the clock's."""
        return self.wall if device.type == "cuda" else self.processor


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> Seconds:
    """One call, with everything that it started on the device."""
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def fastest(calls: dict[str, Callable[[], object]], device: torch.device, *, repeats: int = 5) -> dict[str, Seconds]:
    """The fastest of several rounds of each call, after one that warms up.

    Other load only ever slows a call down, hence the fastest. The calls alternate, in an order that turns around, so
    that none always comes after the same one and all meet the same load.
    """
    rounds = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name in sorted(calls, reverse=number % 2 == 1):
            spent = seconds(calls[name], device)
            if number:
                rounds[name].append(spent)
    return {name: min(rows, key=lambda row: row.best(device)) for name, rows in rounds.items()}


# The peak


def matmul_flops(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> float:
    """FLOP/s of a square matrix product, measured: what an MFU can come to on this machine, now."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = 20 if device.type == "cuda" else 5

    def products():
        for _ in range(times):
            a @ b

    return 2 * side**3 * times / fastest({"product": products}, device)["product"].best(device)


# The result


def card_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else f"{platform.machine()} CPU"


def machine(args: argparse.Namespace) -> dict:
    """What the numbers were measured with and on."""
    return {
        "card": card_name(args.device),
        "data_sheet_flops": peak_flops(card_name(args.device), half=True, tf32=True),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "commit": commit(),
        "cuda": torch.version.cuda if args.device.type == "cuda" else None,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(args: argparse.Namespace, name: str, rows: list[dict], notes: Sequence[str] = ()) -> Path:
    """Print the rows as a table, and write them with the machine and the options; returns the file.

    Args:
        rows: of equal keys, which say their units: `images_per_second`, `peak_gib`; values are numbers or text.
        notes: lines below the table.
    """
    made_on = machine(args)
    print(f"{made_on['card']}, {made_on['threads']} threads, load {made_on['load']:.1f}")
    print(table(rows))
    for note in notes:
        print(note)
    card = re.sub(r"[^\w.]+", "-", made_on["card"].removeprefix("NVIDIA ").split("@")[0]).strip("-").lower()
    file = args.output / f"{name}-{card}-{made_on['date']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in vars(args).items() if key not in ("output", "threads")}
    options = json.loads(json.dumps(options, default=str))
    write_json(file, {"benchmark": name, "machine": made_on, "options": options, "rows": rows, "notes": list(notes)})
    return file


def table(rows: list[dict]) -> str:
    """A Markdown table with aligned columns."""
    head = list(rows[0])
    lines = [head, *([_text(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return "" if value is None else str(value)
