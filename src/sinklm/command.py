"""Runs a command: errors of the user in one line, and output that any terminal or pipe takes."""

import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from .compilers import compile_failure
from .extras import MissingExtraError
from .files import FULL_DISK
from .rust import is_panic
from .text import one_line, printable


def run(command: Callable[[], object]) -> None:
    """Call a command. An error of the user is one line on stderr, with exit status 1.

    Characters that the encoding of stdout does not have are printed as ``?``. If the reader of
    stdout ends first (``| head``), the command ends silently with status 141, as other programs do.
    Set ``SINKLM_DEBUG=1`` to see the traceback of an error and the place of a warning.
    """
    if not os.environ.get("SINKLM_DEBUG"):
        warnings.formatwarning = _format_warning
        warnings.filterwarnings("once", category=UserWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            command()
        finally:
            _flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            _discard_output()
            sys.exit(128 + signal.SIGPIPE)
        message = _message(error)
        if message is None or os.environ.get("SINKLM_DEBUG"):
            raise
        try:
            _flush()
        except OSError as of_output:
            _discard_output()  # Python would fail with it at exit
            message = str(of_output)
        sys.exit(f"error: {printable(message)}")


def _format_warning(message: Warning | str, *details: object, **options: object) -> str:
    """Return a warning in one line, without the place in the code."""
    return f"warning: {printable(str(message))}\n"


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to standard output: {error.strerror}; free space or redirect it") from error


def _message(error: BaseException) -> str | None:
    """Return what to tell the user, or None for a bug and for an exit on purpose."""
    if isinstance(error, OSError) and error.errno in FULL_DISK and error.strerror and error.filename is None:
        return f"cannot write to standard output or a file: {error.strerror}; free space on this device"
    if isinstance(error, ValueError | OSError | MissingExtraError):
        is_library = type(error).__module__.partition(".")[0] not in ("builtins", "sinklm")
        return one_line(error) if is_library else str(error)
    if _is_lack_of_memory(error):
        return f"out of memory; reduce the cache, batch size or number of processes: {error}"
    if failure := compile_failure(error):
        return failure
    if is_panic(error):
        return f"the tokenizer failed ({error}): its tokenizer.json is damaged or not made for this text"
    return None


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy ran out of memory; checked without importing them."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Storage size calculation overflowed")
    is_error = isinstance(error, Exception)
    return isinstance(error, MemoryError) or (is_error and any(sign in str(error) for sign in signs))


def _has_no_reader() -> bool:
    """Whether stdout is a pipe whose reader has ended."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, AttributeError):
        return False


def _discard_output() -> None:
    """Send the rest of stdout to /dev/null."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
