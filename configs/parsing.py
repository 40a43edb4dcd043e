"""argparse with one-line errors, and the kinds of values that flags take."""

import argparse
import os
import re
import sys


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line (argparse itself prints the whole usage first)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        # A list of numbers that begins with a minus is a value, not a flag: "--flag -1,1" as "--flag=-1,1".
        joined = []
        for text in sys.argv[1:] if args is None else args:
            if joined and joined[-1].startswith("--") and re.fullmatch(r"-[\d.]+(,-?[\d.]+)+", text):
                joined[-1] += f"={text}"
            else:
                joined.append(text)
        return super().parse_known_args(joined, namespace)

    def error(self, message):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def positive_int(text: str) -> int:
    return _bounded(int, text, lambda x: x >= 1, "a whole number >= 1")


def natural_int(text: str) -> int:
    return _bounded(int, text, lambda x: x >= 0, "a whole number >= 0")


def positive_float(text: str) -> float:
    return _bounded(float, text, lambda x: 0 < x < float("inf"), "a number > 0")


def natural_float(text: str) -> float:
    return _bounded(float, text, lambda x: 0 <= x < float("inf"), "a number >= 0")


def unit_float(text: str) -> float:
    return _bounded(float, text, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def guidance_float(text: str) -> float:
    return _bounded(float, text, lambda x: 1 <= x < float("inf"), "a number >= 1 (1 switches guidance off)")


def grid_shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} was given, rows x columns such as 8x8 are needed")
    return int(rows), int(columns)


def _bounded(kind, text, holds, needed):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} was given, {needed} is needed")
    return value


def on_off(group, flag: str, default: bool, help: str) -> None:
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
