"""Files that survive interruptions: written whole or not at all, on disk before they count, one writer a folder."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # suffix of a file that is being written


@contextmanager
def atomic_file(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """A file to write, which takes its name when it is complete and on disk. Until then an older one stays.

    Raises:
        OSError: names the file that cannot be written; nothing of it is left.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") if binary else open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file as `atomic_file` does, and make its folder if need be."""
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write ``value`` as indented JSON, as `write_text` does. ``options`` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options) + "\n")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Let errors of writing name the file; the error number stays."""
    try:
        yield
    except OSError as error:
        named = OSError(f"{path} cannot be written: {error.strerror}")
        named.errno = error.errno
        raise named from error


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file. On a file system without locks nothing keeps other processes out.

    Raises:
        ValueError: another process holds the lock; the message is ``busy``.
        OSError: the file cannot be made.
    """
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError:
            pass
        yield


def sync_files(folder: Path) -> None:
    """Bring all files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def replace_folder(new: Path, output: Path) -> None:
    """Rename a finished folder to ``output``. An older one is deleted once the new one is in place."""
    if not output.exists():
        os.rename(new, output)
        return
    old = new.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(output, old)
    try:
        os.rename(new, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
