"""The manifest of a token store: its sources, its contents, and the checksum of every file."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ..files import fingerprint_of
from ..hub import near_path_hint

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
NOTES_NAME = ".prepare"  # folder for unfinished work, inside the output folder
SPLITS = ("train", "validation")
Natural = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Counts(_Strict):
    """Documents, tokens (end-of-document tokens included) and bytes of UTF-8 text."""

    documents: Natural = 0
    tokens: Natural = 0
    bytes: Natural = 0

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes


class Split(_Strict):
    """One split: counts in total and for each Pile set, and its shards (paths without suffix).

    ``shard_sets`` gives the counts by set of each shard; stores of older versions lack it.
    """

    total: Counts
    sets: dict[str, Counts]
    shards: list[str]
    shard_sets: dict[str, dict[str, Counts]] = {}

    @model_validator(mode="after")
    def _counts_agree(self) -> "Split":
        if self.shards != sorted(set(self.shards)):
            raise ValueError("its shards are not in the order of their names")
        if _sum(self.sets.values()) != self.total:
            raise ValueError("the counts of its sets do not add up to its total")
        if self.shard_sets:
            if list(self.shard_sets) != self.shards:
                raise ValueError("shard_sets and shards name different shards")
            by_set: dict[str, Counts] = {}
            for sets in self.shard_sets.values():
                for name, counts in sets.items():
                    by_set.setdefault(name, Counts()).add(counts)
            if by_set != self.sets:
                raise ValueError("the counts of its shards do not add up to those of its sets")
        return self


class TokenizerInfo(_Strict):
    """``size`` is the largest id + 1, added tokens included; ``eod_id`` ends each document."""

    sha256: str
    size: Annotated[int, Field(ge=1)]
    eod_id: Natural

    @model_validator(mode="after")
    def _eod_is_an_id(self) -> "TokenizerInfo":
        if self.eod_id >= self.size:
            raise ValueError(f"eod_id {self.eod_id} is not an id of a tokenizer of {self.size} ids")
        return self


class Source(_Strict):
    """One input shard: its name, its size if known, the number of empty text files in it, and the
    number of unknown tokens, which stand for text that the vocabulary cannot represent.
    """

    name: str
    bytes: int | None
    num_empty_files: int = 0
    num_unknown: Natural = 0

    @model_serializer(mode="wrap")
    def _without_zero(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``num_unknown`` if it is 0: older versions do not know it."""
        return {key: value for key, value in dump(self).items() if value or key != "num_unknown"}


class FileInfo(_Strict):
    bytes: Natural
    sha256: str


def _sum(many: Iterable[Counts]) -> Counts:
    total = Counts()
    for counts in many:
        total.add(counts)
    return total


class Manifest(_Strict):
    """``manifest.json``. ``files`` lists every other file of the store by its relative path.

    Raises:
        ValueError: at construction, if a path leaves the store's folder or the parts disagree.
    """

    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "int32"]
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    text_key: str = "text"
    split_sets: bool = False
    sources: list[Source]
    splits: Annotated[dict[str, Split], Field(min_length=1)]
    files: dict[str, FileInfo]

    @model_validator(mode="after")
    def _agrees(self) -> "Manifest":
        for name in self.files:
            path = PurePath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
                raise ValueError(f"files: {name!r} is not a path inside the store")
        if (found := self.files.get(TOKENIZER_NAME)) is None or found.sha256 != self.tokenizer.sha256:
            raise ValueError(f"files: {TOKENIZER_NAME} is missing or not the tokenizer")
        itemsize = np.dtype(self.dtype).itemsize
        if self.tokenizer.size > np.iinfo(self.dtype).max + 1:
            raise ValueError(f"dtype: {self.dtype} cannot hold {self.tokenizer.size} ids")
        for name, split in self.splits.items():
            if not split.shards:
                raise ValueError(f"splits.{name}: has no shards")
            for shard in split.shards:
                if missing := {f"{shard}.bin", f"{shard}.idx"} - self.files.keys():
                    raise ValueError(f"splits.{name}: {missing.pop()} is not in files")
                held = self.shard_counts(name, shard)
                if held is not None and held.tokens * itemsize != self.files[f"{shard}.bin"].bytes:
                    raise ValueError(f"splits.{name}: the size of {shard}.bin is not that of its {held.tokens} tokens")
            if split.total.tokens * itemsize != sum(self.files[f"{shard}.bin"].bytes for shard in split.shards):
                raise ValueError(f"splits.{name}: the sizes of its files do not match its {split.total.tokens} tokens")
        return self

    def shard_counts(self, split: str, shard: str) -> Counts | None:
        """Return the counts of a shard, or None if the store was made by an older version."""
        sets = self.splits[split].shard_sets.get(shard)
        return None if sets is None else _sum(sets.values())

    @property
    def fingerprint(self) -> str:
        """sha256 over the relative paths and checksums of all files."""
        return fingerprint_of({name: info.sha256 for name, info in self.files.items()})


def read_manifest(store: Path) -> Manifest:
    """Read ``store/manifest.json``.

    Raises:
        FileNotFoundError: the file does not exist; the message says what the folder is instead.
        ValueError: the file is damaged or of another version.
    """
    path = store / MANIFEST_NAME
    if not path.exists():
        if store.exists():
            raise FileNotFoundError(f"{store}: {_what_it_is(store)}")
        hint = near_path_hint(str(store)) or f"make it with `sinklm prepare … --output {store}`"
        raise FileNotFoundError(f"{store}: no such folder; {hint}")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ValueError(
            f"{path}: damaged, or written by another version ({where}: {first['msg']}); copy or prepare the store again"
        ) from None


def _what_it_is(path: Path) -> str:
    """Return what a file or folder is that is not a token store, and what to do."""
    if whole := next((parent for parent in path.absolute().parents[:2] if (parent / MANIFEST_NAME).exists()), None):
        return f"a part of the token store {whole}; pass that folder"
    if (path / NOTES_NAME).exists():
        return "not finished; run the same `sinklm prepare` again to resume"
    if path.is_dir() and any(path.glob("*.idx")):
        return (
            "pairs of Megatron (.bin and .idx) without an order of samples; prepare their text with `sinklm prepare`, "
            "or add the order that GPT-NeoX cached for one pair (*_doc_idx.npy, *_sample_idx.npy, *_shuffle_idx.npy)"
        )
    return f"not a token store (no {MANIFEST_NAME}); pass a folder made by `sinklm prepare`"


def sha256_of(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> list[str]:
    """Return the sha256 of each file, computed in threads (hashing and reading release the GIL)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of, paths))
