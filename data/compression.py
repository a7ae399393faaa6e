"""Streams of decompressed bytes, and their lines, in bounded memory."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import zstandard

from .records import MAX_DOCUMENT_BYTES, too_large

# 128 MiB, as in `zstd --long=27` and `zstd --ultra -22`, and the default limit of the command zstd.
MAX_ZSTD_WINDOW = 2**27
BLOCK = 2**16  # bytes read at a time
# Compressed bytes that are decompressed at a time. A block of a frame has at least 4 bytes and
# yields at most 128 KiB, so the result has at most 32 MiB.
ZSTD_BLOCK = 2**10
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_ZSTD_HEADER = 18


def decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the content of a ``.zst``, ``.gz`` or plain file in pieces.

    Yields:
        A piece of at most 32 MiB, and the number of bytes of the file read so far.

    Raises:
        ValueError: the file is damaged or truncated, or its zstd window is too large.
    """
    decompress = {".zst": _unzstd, ".gz": _gunzip}.get(path.suffix.lower(), _blocks)
    with open(path, "rb") as file:
        for chunk in decompress(file, path):
            yield chunk, file.tell()


def has_checksum(path: Path) -> bool:
    """Whether damage in a compressed file is noticed: False for zstd frames without a checksum.

    Only the first frame is examined.
    """
    if path.suffix.lower() != ".zst":
        return True
    with open(path, "rb") as file:
        head = file.read(MAX_ZSTD_HEADER)
    try:
        return not head.startswith(ZSTD_MAGIC) or zstandard.get_frame_parameters(head).has_checksum
    except zstandard.ZstdError:
        return True  # damaged: an error when it is read


def _blocks(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _unzstd(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Decompress one or more frames. zstandard's stream_reader does not report truncated frames."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = None
    for block in _blocks(file, path):
        for start in range(0, len(block), ZSTD_BLOCK):
            rest = block[start : start + ZSTD_BLOCK]
            while rest:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise _damaged_frame(path, error) from None
                rest = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise ValueError(f"{path}: truncated .zst file, it ends inside a frame; download it again")


def _damaged_frame(path: Path, error: zstandard.ZstdError) -> ValueError:
    if "too much memory" in str(error):
        return ValueError(
            f"{path}: its zstd window is larger than {MAX_ZSTD_WINDOW >> 20} MiB; compress it again: "
            f"zstd -dc --long=31 {path} | zstd > FILE"
        )
    return ValueError(f"{path}: damaged .zst file ({error}); download it again")


def _gunzip(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            yield from _blocks(stream, path)
    except EOFError:
        raise ValueError(f"{path}: truncated .gz file; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged .gz file ({error}); download it again") from None


def lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Split a stream of bytes at newlines only (``bytes.splitlines`` also splits elsewhere).

    Raises:
        ValueError: a line is longer than ``MAX_DOCUMENT_BYTES``.
    """
    begun: list[bytes] = []
    num_begun, number = 0, 1
    for chunk in chunks:
        for i, part in enumerate(chunk.split(b"\n")):
            if i:
                yield b"".join(begun)
                begun, num_begun, number = [], 0, number + 1
            begun.append(part)
            num_begun += len(part)
            if num_begun > MAX_DOCUMENT_BYTES:
                raise too_large(f"{path}, line {number}", num_begun)
    if last := b"".join(begun):
        yield last
