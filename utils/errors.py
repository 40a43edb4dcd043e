"""How a job ends before its end, by a user's mistake, a full disk or a signal: one line on stderr, no traceback."""

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

# Of torch's messages where another process of the job has ended: gloo's, NCCL's and the store's.
_LOST_PROCESS = ("gloo/transport/", "Connection closed by peer", "ncclRemoteError", "Connection was likely closed")

# What asks a job to end: a user's Ctrl-C, and a scheduler that takes the machine away or warns that it will.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # exit code, sysexits' EX_TEMPFAIL: the job was taken away, and the same command goes on


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was given and what is needed, in one line: also
    where it quotes a file's name or a library's text of any characters.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text of several lines as one; of the rest, what cannot be printed (a terminal's commands) as its escape."""
    return printable(re.sub(r"\s*\n\s*", " ", text).strip())


def printable(text: str) -> str:
    """A text with what cannot be printed, such as a newline or what is not UTF-8, as its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Interrupt(KeyboardInterrupt):
    """The job ends because it was asked to. The message says what is lost, what stays, and how the job goes on."""

    def __init__(self, message: str, exit_code: int = REQUEUE):
        super().__init__(message)
        self.exit_code = exit_code


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
    written, too little GPU memory, another process that is gone. Ctrl-C is a line and exit code 130; SIGTERM and
    SIGUSR1 are a line and `REQUEUE`.
    Under a launcher every process leaves with the same code, and rank 0 alone speaks where all fail alike; an error
    that only another rank meets is printed with its rank.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with when_interrupted(lambda: "interrupted"), _heard_in_destructors():
                return _ended_in_one_line(main, argv)
        except KeyboardInterrupt as interrupt:  # also one that came while an error, of a lost process, was handled
            for number in filter(_reaches_us, SIGNALS):
                signal.signal(number, signal.SIG_IGN)  # torchrun sends a second one; one line is enough
            _end_progress(interrupt)
            if int(os.environ.get("RANK", 0)) == 0:
                _say(f"stopped: {interrupt}")
            sys.exit(getattr(interrupt, "exit_code", 130))
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    if handler is not None:  # None: one that is not Python's, which was left alone
                        signal.signal(number, handler)

    return wrapped


def _ended_in_one_line(main, argv):
    try:
        return main(argv)
    except InputError as error:
        _end_progress(error)
        if not getattr(error, "printed", False):
            _say(f"error: {error}")
        sys.exit(2)
    except (FloatingPointError, OSError, RuntimeError) as error:
        if (interrupt := _interrupt_behind(error)) is not None:  # another process is gone already
            raise interrupt from None
        reason = _reason(error)
        if reason is None:  # a fault of ours, for which a traceback helps
            raise
        _end_progress(error)
        if not getattr(error, "printed", False):
            _say(f"stopped: {reason}")
        sys.exit(1)


@contextlib.contextmanager
def when_interrupted(message: Callable[[], str]) -> Iterator[None]:
    """Within it Ctrl-C, SIGTERM and SIGUSR1 end the job with this line: what is lost, what stays, how it goes on."""

    def interrupt(number, _):
        raise Interrupt(message(), 130 if number == signal.SIGINT else REQUEUE)

    with on_signals(interrupt):
        try:
            yield
        except KeyboardInterrupt as error:
            error.args = error.args or (message(),)  # one that something else has raised
            raise


@contextlib.contextmanager
def _heard_in_destructors() -> Iterator[None]:
    """Python drops what is raised while it destroys an object, as a loader: a signal of that moment comes again."""
    drop = sys.unraisablehook

    def hear(unraisable) -> None:
        if not isinstance(unraisable.exc_value, Interrupt):
            return drop(unraisable)
        number = signal.SIGINT if unraisable.exc_value.exit_code == 130 else signal.SIGTERM
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # later: here it would be dropped as well

    sys.unraisablehook = hear
    try:
        yield
    finally:
        sys.unraisablehook = drop


@contextlib.contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """Within it `handler(number, frame)` is called for the `SIGNALS`; those that the job does not hear stay unheard."""
    before = {number: signal.getsignal(number) for number in filter(_reaches_us, SIGNALS)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if signal.getsignal(number) is handler:  # not where a generator is closed after its job has ended
                signal.signal(number, earlier)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals that end a job wait until the block ends; in processes that are started inside, until they let them in.

    Terminals and many schedulers signal all processes of a job, and it is the parent that ends its helpers.
    """
    heard = []
    with on_signals(lambda number, _: heard.append(number)):  # this process's other threads hear what is blocked here
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in heard:
        signal.raise_signal(number)


def leave_signals_to_the_parent(*_) -> None:
    """For a helper process, which ends with its parent: Ctrl-C and many schedulers signal all processes of a job."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Python ends the children that are left with SIGTERM, and waits for them: from the parent it counts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(forked_from: int) -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()  # not what this one was forked from where a fork server does that
    while os.getppid() == forked_from and parent.is_alive():
        signalled = signal.sigtimedwait({signal.SIGTERM}, 1)
        if signalled is not None and signalled.si_pid == parent.pid:
            break
    os._exit(0)


def _reaches_us(number: int) -> bool:
    """Not in a thread, and not a signal out of whose reach the job was put, as shells do with Ctrl-C: so it stays."""
    unheard = (signal.SIG_IGN, None)
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) not in unheard


def _end_progress(error: BaseException) -> None:
    """Let progress bars end their lines, and loaders their processes, which live in the frames of the traceback."""
    traceback.clear_frames(error.__traceback__)


def _say(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    who = f" [rank {rank}]" if rank else ""
    with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee`, too; the exit code says it then
        print(f"{Path(sys.argv[0]).name}{who}: {one_line(message)}", file=sys.stderr)


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that was being handled when an error arose."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _reason(error: Exception) -> str | None:
    """What stopped the job, where it is something that a user can mend; None for our own faults."""
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it here would slow down every script
        return f"the GPU's memory is too small; a smaller batch needs less ({error})"
    if any(words in str(error) for words in _LOST_PROCESS):
        return f"rank {os.environ.get('RANK', 0)} has lost another process, which says why if it could ({error})"
    if str(error).startswith("DataLoader worker"):
        return f"a loader process is gone, perhaps for want of memory; fewer --num-workers need less ({error})"
    return None
