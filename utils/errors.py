"""What a user's mistake looks like: one line on stderr, exit code 2, no traceback."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


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


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let the message of an `InputError` from inside call things by this script's names: {name: name here}."""
    try:
        yield
    except InputError as error:
        for name, here in names.items():
            error.args = (str(error).replace(name, here),)
        raise


def command(main):
    """Wrap a script's `main(argv)`: an `InputError` becomes one line on stderr and exit code 2.

    What stops a job on its way is a line and exit code 1: a divergence, a full disk, a file that cannot be opened or
    written, too little GPU memory. Under a launcher every process leaves with the same code, and rank 0 alone speaks
    where all fail alike; an error that only another rank meets is printed with its rank.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except InputError as error:
            if not getattr(error, "printed", False):
                _say(f"error: {error}")
            sys.exit(2)
        except (FloatingPointError, OSError, RuntimeError) as error:
            reason = _reason(error)
            if reason is None:  # a fault of ours, for which a traceback helps
                raise
            _say(f"stopped: {reason}")
            sys.exit(1)

    return wrapped


def _say(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    who = f" [rank {rank}]" if rank else ""
    print(f"{Path(sys.argv[0]).name}{who}: {' '.join(message.split())}", file=sys.stderr)


def _reason(error: Exception) -> str | None:
    """What stopped the job, where it is something that a user can mend; None for our own faults."""
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would slow down every script
        return f"the GPU's memory is too small; a smaller batch needs less ({error})"
    return None
