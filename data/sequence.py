"""Tokens of ``.bin`` files, and arrays of other files, read by position.

Files are read with ``pread`` and not through memory maps: if a mapped file shrinks, the process
ends with SIGBUS and no message, while ``pread`` returns fewer bytes, which is an error here. At
random places ``pread`` is not slower (docs/results/data.md).
"""

import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

MAX_OPEN_FILES = 128  # per sequence; the usual limit of a process is 1024


class TokenFile:
    """One open file of tokens.

    Args:
        path: the file.
        dtype: dtype of the tokens in it.
        offset: number of bytes before the first one.
    """

    def __init__(self, path: str | os.PathLike, dtype: np.dtype, offset: int = 0):
        self.path, self.dtype, self.offset = Path(path), np.dtype(dtype), offset
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.dtype, self.offset)  # a copy opens the file again

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens ``start … stop - 1`` in the file's dtype.

        Raises:
            OSError: the file is shorter, or cannot be read.
        """
        begin, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        content = b""
        while len(content) < size:
            try:
                part = os.pread(self._descriptor, size - len(content), begin + len(content))
            except OSError as error:
                raise OSError(f"{self.path}: cannot be read ({error.strerror})") from error
            if not part:
                raise OSError(
                    f"{self.path}: ends at byte {begin + len(content)}, before the end that its store lists; it was "
                    "truncated since the store was opened: copy or prepare the store again"
                )
            content = content + part if content else part
        return np.frombuffer(content, self.dtype)


class ArrayFile:
    """An array in a file. ``array[i]`` and ``array[i:j]`` read from it, as of an array in memory.

    Args:
        path: the file, which contains the array in C order.
        dtype, shape: those of the array.
        offset: number of bytes before it.
    """

    def __init__(self, path: str | os.PathLike, dtype: np.dtype, shape: tuple[int, ...], offset: int):
        self.shape, self.ndim = shape, len(shape)
        self._file = TokenFile(path, dtype, offset)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            first = range(len(self))[index]
            return self[first : first + 1][0]
        start, stop, _ = index.indices(len(self))
        width = math.prod(self.shape[1:])
        return self._file.read(start * width, max(start, stop) * width).reshape(-1, *self.shape[1:])


class TokenSequence:
    """The tokens of several files, concatenated. ``len()`` is in tokens.

    Args:
        paths: the ``.bin`` files, in order.
        dtype: dtype of the tokens in them.
        vocab_size: the number of ids of the tokenizer. A token outside of it is an error.
        row_length: length of a row if the data consists of rows (pre-shuffled files).
    """

    def __init__(self, paths: list[Path], dtype: np.dtype, *, vocab_size: int, row_length: int | None = None):
        self.paths, self.dtype = paths, np.dtype(dtype)
        self.vocab_size, self.row_length = vocab_size, row_length
        sizes = [path.stat().st_size // self.dtype.itemsize for path in paths]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._open = self._file_cache()

    def _file_cache(self) -> Callable[[int], TokenFile]:
        # A file that leaves the cache is closed when its last reader is done. The function has no
        # reference to self, so all are closed with the sequence.
        paths, dtype = self.paths, self.dtype
        return lru_cache(MAX_OPEN_FILES)(lambda file: TokenFile(paths[file], dtype))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open = self._file_cache()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens ``start … stop - 1``, int64 ``(stop - start,)``.

        Raises:
            IndexError: the sequence is shorter.
            OSError: a file was truncated, or cannot be read.
            ValueError: a token is not an id of the tokenizer.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} are out of range; the sequence has {len(self)} tokens")
        tokens = np.empty(stop - start, np.int64)
        file = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(tokens):
            begin = start + filled - int(self.starts[file])
            end = min(begin + len(tokens) - filled, int(self.starts[file + 1] - self.starts[file]))
            piece = self._open(file).read(begin, end)
            check_ids(piece, self.vocab_size, self.paths[file], begin)
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1
        return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path, begin: int) -> None:
    """Check that tokens, of which the first is number ``begin`` of a file, are ids.

    Raises:
        ValueError: a token is negative, or not less than ``vocab_size``.
    """
    if not len(tokens) or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    first = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
    raise ValueError(
        f"{path}: contains id {tokens[first]} (token {begin + first}), but the tokenizer's vocabulary has only "
        f"{vocab_size} ids; use the tokenizer that the data was made with, or prepare it again"
    )
