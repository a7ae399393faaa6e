"""Shards of the input: JSON lines (the Pile's format), parquet, text files and Hub data sets.

One process reads raw records, which is cheap; many processes parse them (``record.document()``).
Memory is bounded: files are read in pieces, and a document has at most ``MAX_DOCUMENT_BYTES``.
"""

from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from .compression import decompressed, lines
from .records import MAX_DOCUMENT_BYTES, TEXT_KEY, JsonLine, Record, Row, TextFile, too_large

if TYPE_CHECKING:
    from datasets import IterableDataset

JSON_KINDS = (".jsonl", ".ndjson", ".jsonlines", ".json")
# The longest suffixes first, so that `stem` removes all of it.
JSON_LINES_SUFFIXES = (*(f"{kind}{packed}" for packed in (".zst", ".gz", "") for kind in JSON_KINDS), ".zst")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # in folders; named files and patterns may have other suffixes
KNOWN_SUFFIXES = (*JSON_LINES_SUFFIXES, PARQUET_SUFFIX, *TEXT_SUFFIXES)
# `.json` files in folders are mostly not JSON lines, so they must be named.
FOLDER_SUFFIXES = tuple(suffix for suffix in KNOWN_SUFFIXES if suffix != ".json")
PARQUET_ROWS = 16  # read at a time


class Shard(ABC):
    """A part of the input that becomes one shard of the store.

    Attributes:
        name: name of the source, for messages and the manifest.
        text_key: key or column of the text.
        num_bytes: its size on disk, or None if not known.
        position: number of these bytes that the current ``read()`` has consumed.
    """

    name: str
    text_key: str
    num_bytes: int | None
    position: int = 0

    @abstractmethod
    def read(self, skip: int = 0) -> Iterator[Record]:
        """Yield the records after the first ``skip``, in order."""


@dataclass
class JsonLinesShard(Shard):
    """A file of one of ``JSON_LINES_SUFFIXES``. Blank lines and a byte order mark are skipped."""

    path: Path
    text_key: str = TEXT_KEY
    position: int = 0

    def __post_init__(self):
        self.name = self.path.name
        self.num_bytes = self.path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[JsonLine]:
        set_name = stem(self.path)
        for number, line in enumerate(lines(self._chunks(), self.path), start=1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if not line or line.isspace():
                continue
            if skip:
                skip -= 1
                continue
            yield JsonLine(f"{self.path}, line {number}", set_name, line, self.text_key)

    def _chunks(self) -> Iterator[bytes]:
        for chunk, position in decompressed(self.path):
            self.position = position
            yield chunk


@dataclass
class ParquetShard(Shard):
    """A parquet file with a string column ``text_key`` and an optional struct column ``meta``."""

    path: Path
    text_key: str = TEXT_KEY
    position: int = 0

    def __post_init__(self):
        self.name = self.path.name
        self.num_bytes = self.path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[Row]:
        from pyarrow import ArrowException

        try:
            yield from self._rows(skip)
        except (ArrowException, UnicodeDecodeError) as error:
            raise self._damage(error) from None
        except OSError as error:  # pyarrow's own have no errno
            raise error if error.errno else self._damage(error) from None

    def _damage(self, error: Exception) -> ValueError:
        reason = (str(error).splitlines() or [""])[0]
        return ValueError(
            f"{self.path}: not a parquet file, or a damaged or truncated one ({reason}); download it again"
        )

    def _rows(self, skip: int) -> Iterator[Row]:
        from pyarrow import parquet

        # Unbuffered, pyarrow reads whole column chunks, which may have gigabytes.
        with parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if self.text_key not in names:
                raise ValueError(
                    f'{self.path}: has no column "{self.text_key}", only {", ".join(names)}; name the column of the '
                    "text with --text-key"
                )
            columns = [name for name in (self.text_key, "meta") if name in names]
            number, num_bytes, set_name = 0, self.path.stat().st_size, stem(self.path)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                rows = batch.slice(min(max(skip - number, 0), len(batch))).to_pylist()
                number += len(batch) - len(rows)
                for row in rows:
                    number += 1
                    self.position = num_bytes * number // file.metadata.num_rows
                    yield _bounded(Row(f"{self.path}, row {number}", set_name, row, self.text_key))


def _bounded(row: Row) -> Row:
    if row.num_bytes > MAX_DOCUMENT_BYTES:
        raise too_large(row.place, row.num_bytes)
    return row


@dataclass
class TextShard(Shard):
    """Consecutive text files: each is one document, together they form one shard.

    Args:
        name: name of the input that the first file came from.
        files: the paths, each with the name of its set.
        text_key: a file whose first line is a JSON object with this key is refused.
    """

    name: str
    text_key: str = TEXT_KEY
    files: list[tuple[Path, str]] = field(default_factory=list)
    num_bytes: int = 0
    position: int = 0

    def add(self, path: Path, set_name: str) -> None:
        self.files.append((path, set_name))
        self.num_bytes += path.stat().st_size

    def read(self, skip: int = 0) -> Iterator[TextFile]:
        self.position = sum(path.stat().st_size for path, _ in self.files[:skip])
        for path, set_name in self.files[skip:]:
            if (size := path.stat().st_size) > MAX_DOCUMENT_BYTES:
                raise too_large(str(path), size)
            content = path.read_bytes()
            if _is_json_lines(content, self.text_key):
                raise ValueError(
                    f"{path}: contains JSON lines, but its name does not say so, so it would be one document of raw "
                    "JSON; give it a name that ends in .jsonl"
                )
            self.position += len(content)
            yield TextFile(str(path), set_name, content)


def _is_json_lines(content: bytes, text_key: str) -> bool:
    """Whether the first line that is not blank is a JSON object with this key."""
    content = content.removeprefix(BOM_UTF8).lstrip()
    if not content.startswith(b"{"):
        return False
    try:
        return text_key in orjson.loads(content.partition(b"\n")[0])
    except orjson.JSONDecodeError:
        return False


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
    text_key: str = TEXT_KEY
    num_bytes: int | None = None
    position: int = 0

    def read(self, skip: int = 0) -> Iterator[Row]:
        for number, row in enumerate(self.dataset.skip(skip), start=skip + 1):
            yield _bounded(Row(f"{self.name}, row {number}", self.set_name, row, self.text_key))


def stem(path: Path) -> str:
    """Return the file's name without its suffix, if the suffix is a known one."""
    for suffix in KNOWN_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
