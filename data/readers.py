"""Readers for JSON lines (the Pile's format), parquet, text files and Hub data sets.

One process reads raw records, which is cheap; many processes parse them (``record.document()``). No
record is skipped silently: one that is not a document raises an error that names file and line.
"""

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import orjson
import zstandard

if TYPE_CHECKING:
    from datasets import IterableDataset

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".zst")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # in folders; named files and patterns may have other suffixes
FOLDER_SUFFIXES = (*JSON_LINES_SUFFIXES, PARQUET_SUFFIX, *TEXT_SUFFIXES)
MAX_ZSTD_WINDOW = 2**31  # the Pile's shards need 2**27 (`zstd --long=27`), more than zstandard allows by default
BLOCK = 2**16  # bytes read at a time


class Document(NamedTuple):
    text: str
    set_name: str


class JsonLine(NamedTuple):
    """One line of a JSON-lines file, ``{"text": …, "meta": {"pile_set_name": …}}``."""

    place: str
    set_name: str
    line: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.line)

    def document(self) -> Document:
        try:
            row = orjson.loads(self.line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{self.place}: not valid JSON ({error}); fix or remove this line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.place}: not a JSON object but a {type(row).__name__}; fix or remove this line")
        return _document_of(row, self.place, self.set_name)


class Row(NamedTuple):
    """One row of a parquet file or a Hub data set, with the same fields."""

    place: str
    set_name: str
    row: dict

    @property
    def num_bytes(self) -> int:
        text = self.row.get("text")
        return len(text) if isinstance(text, str) else 0

    def document(self) -> Document:
        return _document_of(self.row, self.place, self.set_name)


class TextFile(NamedTuple):
    """One text file, which is one document unless it is empty (such as ``__init__.py``)."""

    place: str
    set_name: str
    content: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def document(self) -> Document | None:
        if b"\0" in self.content:
            raise ValueError(f"{self.place}: contains NUL bytes, so it is not a text file; remove it from the inputs")
        try:
            text = self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.place}: not UTF-8 ({error.reason} at byte {error.start}); convert or remove the file"
            ) from None
        return Document(text, self.set_name) if text else None


Record = JsonLine | Row | TextFile


def _document_of(row: dict, place: str, set_name: str) -> Document:
    text, meta = row.get("text"), row.get("meta")
    if not isinstance(text, str) or not text:
        found = "is empty" if text == "" else f"is of type {type(text).__name__}" if "text" in row else "is missing"
        raise ValueError(f'{place}: the record has no text (key "text" {found}); fix or remove it')
    if isinstance(meta, dict) and isinstance(meta.get("pile_set_name"), str):
        set_name = meta["pile_set_name"]
    return Document(text, set_name)


class Shard(ABC):
    """A part of the input that becomes one shard of the store.

    Attributes:
        name: name of the source, for messages and the manifest.
        num_bytes: its size on disk, or None if not known.
        position: number of these bytes that the current ``read()`` has consumed.
    """

    name: str
    num_bytes: int | None
    position: int = 0

    @abstractmethod
    def read(self, skip: int = 0) -> Iterator[Record]:
        """Yield the records after the first ``skip``, in order."""


@dataclass
class JsonLinesShard(Shard):
    """A ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` or ``.zst`` file. Blank lines are skipped."""

    path: Path
    position: int = 0

    def __post_init__(self):
        self.name = self.path.name
        self.num_bytes = self.path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[JsonLine]:
        set_name = stem(self.path)
        for number, line in enumerate(_lines(self._chunks()), start=1):
            if not line or line.isspace():
                continue
            if skip:
                skip -= 1
                continue
            yield JsonLine(f"{self.path}, line {number}", set_name, line)

    def _chunks(self) -> Iterator[bytes]:
        decompress = {".zst": _unzstd, ".gz": _gunzip}.get(self.path.suffix, _blocks)
        with open(self.path, "rb") as file:
            for chunk in decompress(file, self.path):
                self.position = file.tell()
                yield chunk


def _blocks(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _unzstd(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Decompress one or more frames. zstandard's stream_reader does not report truncated frames."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    frame = None
    for block in _blocks(file, path):
        while block:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path}: damaged .zst file ({error}); download it again") from None
            block = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise ValueError(f"{path}: truncated .zst file, it ends inside a frame; download it again")


def _gunzip(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            yield from _blocks(stream, path)
    except EOFError:
        raise ValueError(f"{path}: truncated .gz file; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged .gz file ({error}); download it again") from None


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split a stream of bytes at newlines only (``bytes.splitlines`` also splits elsewhere)."""
    begun: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if last := b"".join(begun):
        yield last


@dataclass
class ParquetShard(Shard):
    """A parquet file with a string column ``text`` and an optional struct column ``meta``."""

    path: Path
    position: int = 0

    def __post_init__(self):
        self.name = self.path.name
        self.num_bytes = self.path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[Row]:
        from pyarrow import ArrowInvalid, parquet

        try:
            file = parquet.ParquetFile(self.path)
        except ArrowInvalid as error:
            raise ValueError(
                f"{self.path}: not a parquet file, or a truncated one ({error}); download it again"
            ) from None
        with file:
            columns = [name for name in ("text", "meta") if name in file.schema_arrow.names]
            if "text" not in columns:
                raise ValueError(
                    f'{self.path}: has no column "text", only {", ".join(file.schema_arrow.names)}; rename the column'
                )
            number, num_bytes, set_name = 0, self.path.stat().st_size, stem(self.path)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                rows = batch.slice(min(max(skip - number, 0), len(batch))).to_pylist()
                number += len(batch) - len(rows)
                for row in rows:
                    number += 1
                    self.position = num_bytes * number // file.metadata.num_rows
                    yield Row(f"{self.path}, row {number}", set_name, row)


@dataclass
class TextShard(Shard):
    """Consecutive text files: each is one document, together they form one shard.

    Args:
        name: name of the input that the first file came from.
        files: the paths, each with the name of its set.
    """

    name: str
    files: list[tuple[Path, str]] = field(default_factory=list)
    num_bytes: int = 0
    position: int = 0

    def add(self, path: Path, set_name: str) -> None:
        self.files.append((path, set_name))
        self.num_bytes += path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[TextFile]:
        self.position = sum(path.stat().st_size for path, _ in self.files[:skip])
        for path, set_name in self.files[skip:]:
            content = path.read_bytes()
            self.position += len(content)
            yield TextFile(str(path), set_name, content)


@dataclass
class HubShard(Shard):
    """One file of a Hub data set, streamed by ``datasets``.

    Args:
        dataset: a ``datasets.IterableDataset`` of this file only.
        name: the data set's name and the file's number.
        set_name: the data set's name.
    """

    dataset: "IterableDataset"
    name: str
    set_name: str
    num_bytes: int | None = None
    position: int = 0

    def read(self, skip: int = 0) -> Iterator[Row]:
        for number, row in enumerate(self.dataset.skip(skip), start=skip + 1):
            yield Row(f"{self.name}, row {number}", self.set_name, row)


def stem(path: Path) -> str:
    """Return the file's name without its suffix, if the suffix is a known one."""
    for suffix in FOLDER_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name
