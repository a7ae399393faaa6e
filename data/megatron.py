"""Megatron-LM's indexed data set (``MMIDIDX``, version 1): tokens in ``.bin``, lengths in ``.idx``.

The format is that of ``megatron/core/datasets/indexed_dataset.py`` in NVIDIA/Megatron-LM, which
GPT-NeoX and Megatron-DeepSpeed also use, so the files are interchangeable with theirs.
"""

import os
import struct
from pathlib import Path

import numpy as np

from ..files import atomic_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, length of the document index
TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in TOKEN_DTYPES.items()}


def token_dtype(tokenizer_size: int) -> np.dtype:
    """Return the smallest dtype for the ids ``0 … tokenizer_size - 1``: uint16 or int32."""
    return np.dtype(np.uint16 if tokenizer_size <= 65535 else np.int32)


class MegatronReader:
    """Random access to the documents of one ``.bin``/``.idx`` pair, through memory maps.

    ``len(reader)`` is the number of sequences (here: documents); ``reader[i]`` is the i-th, of
    shape ``(length,)`` in the file's dtype.

    Args:
        prefix: common path of the two files without suffix.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the index is not ``MMIDIDX`` version 1 with integer tokens, or the two files do
            not match.
    """

    def __init__(self, prefix: str | os.PathLike):
        index_path, token_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.dtype, self.lengths, self.pointers, self.document_indices = _read_index(index_path)
        num_bytes = token_path.stat().st_size
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if num_bytes != expected:
            raise ValueError(
                f"{token_path}: {num_bytes} bytes, but the index expects {expected}; "
                "the file is damaged, copy or prepare it again"
            )
        self.tokens = map_tokens(token_path, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Read an index.

    Returns:
        dtype, lengths ``(num_sequences,)``, byte pointers ``(num_sequences,)`` and document index
        ``(num_documents + 1,)``.
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
    if path.stat().st_size not in (expected, expected + num_sequences):
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes instead of {expected}; the index is damaged, copy or prepare it again"
        )
    content = np.memmap(path, dtype=np.uint8, mode="r")
    lengths_end = HEADER.size + num_sequences * 4
    pointers_end = lengths_end + num_sequences * 8
    return (
        np.dtype(TOKEN_DTYPES[code]),
        content[HEADER.size : lengths_end].view(np.int32),
        content[lengths_end:pointers_end].view(np.int64),
        content[pointers_end:expected].view(np.int64),
    )


def map_tokens(path: str | os.PathLike, dtype: np.dtype) -> np.ndarray:
    """Map a file as a read-only array ``(num_tokens,)``; also supports empty files, unlike mmap."""
    if os.path.getsize(path) == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class MegatronWriter:
    """Appends documents to a pair of files that get their final names only when complete.

    Until ``finish()`` the tokens are in ``<prefix>.bin.partial`` and the lengths in
    ``<prefix>.lengths.partial``. A later writer can resume at the counts that ``commit()``
    returned.

    Args:
        prefix: common path of the two files without suffix; its folder must exist.
        dtype: dtype of the tokens, see :func:`token_dtype`.
        num_documents, num_tokens: counts that an earlier writer committed; later data is dropped.

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
