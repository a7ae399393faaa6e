"""The manifest of a token store: its sources, its contents, and the checksum of every file."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Counts(_Strict):
    """Documents, tokens (end-of-document tokens included) and bytes of UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes


class Split(_Strict):
    """One split: counts in total and for each Pile set, and its shards (paths without suffix)."""

    total: Counts
    sets: dict[str, Counts]
    shards: list[str]


class TokenizerInfo(_Strict):
    """``size`` is the largest id + 1, added tokens included; ``eod_id`` ends each document."""

    sha256: str
    size: int
    eod_id: int


class Source(_Strict):
    """One input shard: its name, its size if known, and the number of empty text files in it."""

    name: str
    bytes: int | None
    num_empty_files: int = 0


class FileInfo(_Strict):
    bytes: int
    sha256: str


class Manifest(_Strict):
    """``manifest.json``. ``files`` lists every other file of the store by its relative path."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "int32"]
    validation_fraction: float
    sources: list[Source]
    splits: dict[str, Split]
    files: dict[str, FileInfo]

    @property
    def fingerprint(self) -> str:
        """sha256 over the relative paths and checksums of all files."""
        lines = "".join(f"{name} {info.sha256}\n" for name, info in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(store: Path) -> Manifest:
    """Read ``store/manifest.json``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another version.
    """
    path = store / MANIFEST_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"{store}: not a token store (no {MANIFEST_NAME}); make one with `sinklm prepare … --output {store}`"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ValueError(
            f"{path}: damaged, or written by another version ({where}: {first['msg']}); copy or prepare the store again"
        ) from None


def sha256_of(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> list[str]:
    """Return the sha256 of each file, computed in threads (hashing and reading release the GIL)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, paths))
