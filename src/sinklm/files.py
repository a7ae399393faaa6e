"""Files: texts of users, atomic files and folders synced to disk, and lock files."""

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .hub import near_path_hint
from .text import decoded

PARTIAL = ".partial"  # suffix of a file that is being written
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota and a limit on the size of files
NUM_LOCK_ATTEMPTS = 4  # `is_locked` of another process may have the lock for a moment


def partial_name(name: str) -> str:
    """Return the name of an unfinished file of `atomic_file`, hidden and unlike a user's own."""
    return f".{name.removeprefix('.')}{PARTIAL}"


def read_text(path: Path, remedy: str, *, option: str = "") -> str:
    """Return the text of a user's file in UTF-8, without a byte order mark, with its line ends.

    Args:
        remedy: what to do if it cannot be read; for a missing file, similar names are better.
        option: that the file was passed to, for messages.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or has NUL bytes.
    """
    named = f"{option} {path}".lstrip()
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = near_path_hint(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise type(error)(f"{named} cannot be read: {error.strerror}; {hint or remedy}") from error
    return decoded(content, named, remedy)


@contextmanager
def atomic_file(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """Open a file for writing that gets its name when it is complete and on disk.

    Until then an older file of that name is unchanged. A link stays, and its target is written.

    Raises:
        OSError: the file cannot be written. The partial file is deleted.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(partial_name(path.name))
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
    """Write a file with `atomic_file`, and create its folder if it does not exist."""
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text)


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write ``value`` as indented JSON with `write_text`; ``options`` are those of `json.dumps`."""
    write_text(path, json.dumps(value, indent=2, **options) + "\n")


def fingerprint_of(checksums: Mapping[str, str]) -> str:
    """Return the sha256 of the names of files and their sha256, in any order."""
    lines = "".join(f"{name} {checksum}\n" for name, checksum in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_writable(path: Path) -> None:
    """Check that a file or folder can be created at ``path``; nothing is created or changed.

    Raises:
        OSError: it cannot.
    """
    with named_errors(path):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()


def check_new(output: Path, kind: str) -> Path:
    """Check that a file or folder can be created at ``output``; an empty folder may exist there.

    Nothing is ever replaced: an older file or folder may have been changed, or be of another model.

    Args:
        kind: ``"file"`` or ``"folder"``.

    Returns:
        The absolute path to create, which is the target if ``output`` is a symbolic link.

    Raises:
        FileExistsError: ``output`` exists.
        OSError: it cannot be created.
    """
    path = Path(os.path.realpath(output))
    check_writable(output if os.path.abspath(output) == str(path) else path)  # as the user wrote it, if it is no link
    is_empty_folder = kind == "folder" and path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty_folder:
        raise FileExistsError(f"{output} exists: choose another output {kind}, or delete it")
    return path


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to the message of an OSError; its errno does not change."""
    try:
        yield
    except OSError as error:
        named = OSError(f"cannot write {path}: {error.strerror or error}")
        named.errno = error.errno
        raise named from error


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Lock a file. On a file system without locks, other processes are not excluded.

    Raises:
        ValueError: another process has the lock; the message is ``busy``.
        OSError: the file cannot be created.
    """
    with open(path, "w") as lock:
        for attempts_left in reversed(range(NUM_LOCK_ATTEMPTS)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not attempts_left:
                    raise ValueError(busy) from None
                time.sleep(0.1)
                continue
            except OSError:
                pass
            break
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file. False on a file system without locks."""
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def sync_file(path: Path) -> None:
    """Sync the content of a file to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk: new, renamed and deleted files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not supported by the file system
            raise
    finally:
        os.close(descriptor)
