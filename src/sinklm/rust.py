"""Panics of libraries that are written in Rust (tokenizers, safetensors)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a Rust panic. Its class is not importable, and no `Exception`."""
    return type(error).__name__ == "PanicException"


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2, to which Rust prints its panics."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
