"""Megatron-LM's indexed data set (``MMIDIDX``, version 1): tokens in ``.bin``, lengths in ``.idx``.

The format is that of ``megatron/core/datasets/indexed_dataset.py`` in NVIDIA/Megatron-LM, which
GPT-NeoX and Megatron-DeepSpeed also use, so the files are interchangeable with theirs.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import atomic_file
from .sequence import ArrayFile, TokenFile

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, length of the document index
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
AGAIN = "copy or prepare it again"
CHECKED_AT_ONCE = 2**20  # sequences
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in TOKEN_DTYPES.items()}


def token_dtype(tokenizer_size: int) -> np.dtype:
    """Return the smallest dtype for the ids ``0 … tokenizer_size - 1``: uint16 or int32."""
    return np.dtype(np.uint16 if tokenizer_size <= 65535 else np.int32)


class IndexHeader(NamedTuple):
    """The first bytes of an index: dtype of the tokens and the lengths of its arrays."""

    dtype: np.dtype
    num_sequences: int
    num_document_indices: int


def read_index_header(path: Path) -> IndexHeader:
    """Read the header of an ``.idx`` file.

    Raises:
        ValueError: it is not ``MMIDIDX`` version 1 with integer tokens, or its size is wrong.
    """
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{path}: not a Megatron index (it does not start with MMIDIDX)")
    _, version, code, num_sequences, num_document_indices = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{path}: MMIDIDX version {version} is not supported, only version {VERSION}")
    if code not in TOKEN_DTYPES:
        raise ValueError(f"{path}: dtype code {code} is not an integer type, so these are not token ids")
    expected = HEADER.size + num_sequences * 12 + num_document_indices * 8
    # Multimodal data sets append one byte per sequence ("modes"), which is not used here.
    if (size := path.stat().st_size) not in (expected, expected + num_sequences):
        raise ValueError(f"{path}: {size} bytes instead of {expected}; the index is damaged, {AGAIN}")
    return IndexHeader(np.dtype(TOKEN_DTYPES[code]), num_sequences, num_document_indices)


class MegatronReader:
    """Random access to the documents of one ``.bin``/``.idx`` pair.

    ``len(reader)`` is the number of sequences (here: documents); ``reader[i]`` is the i-th, of
    shape ``(length,)`` in the file's dtype. The index is read by position.

    Args:
        prefix: common path of the two files without suffix.
        check: whether to read and check the whole index, which has 20 bytes per document.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the index is not ``MMIDIDX`` version 1 with integer tokens, it is damaged, or
            the two files do not match.
    """

    def __init__(self, prefix: str | os.PathLike, *, check: bool = True):
        index_path, token_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        header = read_index_header(index_path)
        self.dtype = header.dtype
        offset, parts = HEADER.size, []
        for dtype, number in (
            (np.int32, header.num_sequences),
            (np.int64, header.num_sequences),
            (np.int64, header.num_document_indices),
        ):
            parts.append(ArrayFile(index_path, np.dtype(dtype), (number,), offset))
            offset += number * np.dtype(dtype).itemsize
        self.lengths, self.pointers, self.document_indices = parts
        if check:
            self._check_index(index_path, token_path)
        self._tokens = TokenFile(token_path, self.dtype)

    def _check_index(self, index_path: Path, token_path: Path) -> None:
        """Check that every sequence is inside the file and that the documents are in order."""
        num_bytes, size, total = token_path.stat().st_size, self.dtype.itemsize, 0
        for start in range(0, len(self.lengths), CHECKED_AT_ONCE):
            lengths = self.lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
            pointers = self.pointers[start : start + CHECKED_AT_ONCE]
            if lengths.min() < 0:
                raise ValueError(f"{index_path}: a sequence has a negative length; the index is damaged, {AGAIN}")
            total += int(lengths.sum()) * size
            is_outside = (pointers < 0) | (pointers > num_bytes - lengths * size)
            if total <= num_bytes and (is_outside.any() or (pointers % size).any()):
                raise ValueError(
                    f"{index_path}: points outside of {token_path.name}, or between two tokens; the index is damaged, "
                    f"{AGAIN}"
                )
        if total != num_bytes:
            raise ValueError(
                f"{token_path}: {num_bytes} bytes, but the index expects {total}; the file is damaged, {AGAIN}"
            )
        previous = 0
        for start in range(0, len(self.document_indices), CHECKED_AT_ONCE):
            indices = np.concatenate([[previous], self.document_indices[start : start + CHECKED_AT_ONCE]])
            if (np.diff(indices) < 0).any() or (start == 0 and indices[1] != 0):
                previous = -1
                break
            previous = int(indices[-1])
        if previous != len(self.lengths):
            raise ValueError(
                f"{index_path}: the document index does not rise from 0 to {len(self.lengths)}; the index is damaged, "
                f"{AGAIN}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self._tokens.read(start, start + int(self.lengths[i]))


class MegatronWriter:
    """Appends documents to a pair of files that get their final names only when complete.

    Until ``finish()`` the tokens are in ``<prefix>.bin.partial`` and the lengths in
    ``<prefix>.lengths.partial``. A later writer can resume at the counts that ``commit()``
    returned.

    Args:
        prefix: common path of the two files without suffix; its folder must exist.
        dtype: dtype of the tokens, see :func:`token_dtype`.
        num_documents: as committed by an earlier writer; later data is dropped.
        num_tokens: the same.

    Raises:
        ValueError: the partial files contain less than ``num_documents`` and ``num_tokens``.
    """

    def __init__(self, prefix: str | os.PathLike, dtype: np.dtype, *, num_documents: int = 0, num_tokens: int = 0):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.num_documents, self.num_tokens = num_documents, num_tokens
        self._token_path, self._length_path = Path(f"{prefix}.bin.partial"), Path(f"{prefix}.lengths.partial")
        self._tokens = _open_at(self._token_path, num_tokens * self.dtype.itemsize)
        self._lengths = _open_at(self._length_path, num_documents * 4)

    @staticmethod
    def can_go_on(prefix: str | os.PathLike, dtype: np.dtype, num_documents: int, num_tokens: int) -> bool:
        """Whether the partial files contain at least this many documents and tokens."""
        needed = {f"{prefix}.bin.partial": num_tokens * dtype.itemsize, f"{prefix}.lengths.partial": num_documents * 4}
        return all(os.path.exists(path) and os.path.getsize(path) >= size for path, size in needed.items())

    def add(self, tokens: np.ndarray, lengths: np.ndarray | list[int] | None = None) -> None:
        """Append one document, or several concatenated documents of these ``lengths``."""
        lengths = np.asarray([len(tokens)] if lengths is None else lengths, dtype=np.int64)
        if lengths.sum() != len(tokens):
            raise ValueError(f"got {len(tokens)} tokens, but the lengths add up to {lengths.sum()}; they must be equal")
        if lengths.max(initial=0) > np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.prefix}: a document has {lengths.max()} tokens, but the format's limit is 2**31 - 1; split it"
            )
        self._tokens.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.write(lengths.astype(np.int32).data)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def commit(self) -> tuple[int, int]:
        """Flush everything to disk; returns the numbers of documents and tokens written so far."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        return self.num_documents, self.num_tokens

    def close(self) -> None:
        """Close the partial files without finishing them; on a full disk, drop buffered data."""
        for file in (self._tokens, self._lengths):
            try:
                file.close()
            except OSError:
                file.raw.close()

    def finish(self) -> None:
        """Write the index and rename both files. A pair without documents leaves no files."""
        self.commit()
        self.close()
        if self.num_documents:
            lengths = np.fromfile(self._length_path, dtype=np.int32)
            _write_index(Path(f"{self.prefix}.idx"), self.dtype, lengths)
            os.replace(self._token_path, f"{self.prefix}.bin")
        self._token_path.unlink(missing_ok=True)
        self._length_path.unlink()


def _open_at(path: Path, num_bytes: int):
    """Open ``path`` for appending after its first ``num_bytes``; the rest is dropped."""
    size = path.stat().st_size if path.exists() else 0
    if size < num_bytes:
        raise ValueError(f"{path}: {size} bytes, but {num_bytes} were committed; delete it to restart this shard")
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (the writer closes it)
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file


def _write_index(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    with atomic_file(path, binary=True) as file:
        file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        file.write(lengths.astype(np.int32).data)
        file.write(pointers.data)
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)
