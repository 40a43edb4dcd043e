"""What a user's mistake looks like: one line on stderr, exit code 2, no traceback."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was given and what is needed, in one line."""


@contextlib.contextmanager
def about(flag: str) -> Iterator[None]:
    """Put the flag in front of the message of an `InputError` from inside, which names only the file."""
    try:
        yield
    except InputError as error:
        error.args = (f"{flag}: {error}",)  # the same error: it may be one that rank 0 has printed
        raise


def command(main):
    """Wrap a script's `main(argv)`: an `InputError` becomes one line on stderr and exit code 2, a divergence code 1.

    Under a launcher every process leaves with the same code, and rank 0 alone speaks where all fail alike;
    an error that only another rank meets is printed with its rank.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except InputError as error:
            if not getattr(error, "printed", False):
                rank = int(os.environ.get("RANK", 0))
                who = f" [rank {rank}]" if rank else ""
                message = " ".join(str(error).split())
                print(f"{Path(sys.argv[0]).name}{who}: error: {message}", file=sys.stderr)
            sys.exit(2)
        except FloatingPointError as error:  # the run diverged: no fault of the command line, and no traceback helps
            print(f"{Path(sys.argv[0]).name}: stopped: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped
