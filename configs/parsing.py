"""argparse with one-line errors, and the kinds of values that flags take."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path


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

    def answer_before_imports(
        self,
        parse: Callable[[], argparse.Namespace] | None = None,
        check: Callable[[argparse.Namespace], None] | None = None,
    ) -> None:
        """Answer --help and a mistyped flag; from here on, until `main` begins, Ctrl-C ends the process in one line.

        Args:
            parse: reads the command line where `parse_args` alone does not.
            check: raises a ValueError for what `main` would refuse. Several processes leave together, which needs
                `main`: there it is not asked.
        """
        args = (parse or self.parse_args)()
        if check is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            try:
                check(args)
            except ValueError as error:
                self.error(" ".join(str(error).split()))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is another where a shell ignores Ctrl-C
            signal.signal(signal.SIGINT, self._leave)

    def _leave(self, *_):
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(2, f"{self.prog}: stopped: interrupted\n".encode())
        os._exit(130)  # an exception could be caught by whatever is being imported


def flag_of(name: str) -> str:
    """The flag whose value argparse keeps under this name."""
    return f"--{name.replace('_', '-')}"


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


def time_shift(text: str) -> float | str:
    return text if text == "auto" else _bounded(float, text, lambda x: 0 < x < float("inf"), "a number > 0, or auto,")


def weighting(text: str) -> str:
    """How t is drawn, as runs store it: the public code's `lognormal` is what others call logit-normal."""
    return "lognormal" if text == "logit-normal" else text


def refused(reason: str) -> Callable[[str], None]:
    """Of a flag that another script has, and that cannot be meant here."""

    def refuse(text: str) -> None:
        raise argparse.ArgumentTypeError(f"{text!r} was given; {reason}")

    return refuse


def grid_shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} was given, rows x columns such as 8x8 are needed")
    return int(rows), int(columns)


def some_of(*names: str) -> Callable[[str], list[str]]:
    """Some of these names, between commas."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"{text!r} was given, a comma list of {', '.join(names)} is needed")
        return chosen

    return parse


class Shipped(str):
    """A default that is a file of this repository, named from its root: found from any folder (a path that is given
    counts from the current folder, also where it reads the same)."""


def path(text: str) -> str:
    """A file or folder, with the user's home for a leading `~`; where a name goes too (ORG/NAME), it stays as it is."""
    if isinstance(text, Shipped):
        return os.path.relpath(Path(__file__).parents[1] / text)
    return os.path.expanduser(text)  # noqa: PTH111 - pathlib's would rewrite "./x", and stop at an unknown "~name"


def paths(text: str) -> str:
    """Files between commas."""
    return ",".join(path(file.strip()) for file in text.split(","))


def encoders(text: str) -> str:
    """Names of encoders between commas; that of a folder, `timm:local-dir:FOLDER`, holds a path."""
    return re.sub(r"(?<=:local-dir:)[^,]+", lambda folder: path(folder[0]), text)


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


class OneSpelling(argparse.Action):
    """Store the value of a flag with two spellings; both at once could contradict each other."""

    spelling = None  # under which it was given

    def __call__(self, parser, namespace, values, option_string=None):
        if self.spelling not in (None, option_string):
            parser.error(f"{self.spelling} and {option_string} are one flag, and both were given")
        self.spelling = option_string
        setattr(namespace, self.dest, values)
