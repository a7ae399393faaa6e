"""The token store: tokenized documents as Megatron file pairs, described by a manifest."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..files import write_json
from ..parsing import parse_json
from .manifest import MANIFEST_NAME, TOKENIZER_NAME, FileInfo, Manifest, read_manifest, sha256_of, sha256_of_all
from .megatron import MegatronReader, read_index_header
from .sequence import TokenSequence
from .tokenizer import load_tokenizer_file, tokenizer_size

VERIFIED_NAME = ".verified.json"
Verify = Literal["auto", "size", "sha256"]


class Tokens(Protocol):
    """What training requires of a split: :class:`TokenSequence` and :class:`OrderedRows`."""

    @property
    def row_length(self) -> int | None: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class TokenSource(Protocol):
    """What training requires of a store, see :func:`open_store`."""

    path: Path
    tokenizer_size: int
    tokenizer_path: Path
    eod_id: int
    fingerprint: str
    is_shuffled: bool

    def split(self, name: str) -> Tokens: ...

    def documents_of_set(self, split: str, set_name: str) -> Tokens: ...

    def document(self, split: str, number: int) -> np.ndarray: ...


class TokenStore:
    """A folder made by ``sinklm prepare``, opened for reading.

    Args:
        path: the folder.
        verify: how files are checked against the manifest. "size" checks that every file exists and
            has the right size, and the tokenizer; "sha256" also reads every file; "auto" also reads
            the files that are new or changed since they were last verified, see `note_verified`.
        on_read: called with a number of bytes before files are read to verify them.

    Attributes:
        manifest: see :class:`Manifest`.
        tokenizer_size: the tokenizer's largest id + 1, added tokens included.
        tokenizer_path: the store's ``tokenizer.json``.
        eod_id: the id at the end of each document.
        fingerprint: sha256 over the files' checksums; it does not depend on the store's location.
        is_shuffled: False; see :class:`PreshuffledStore`.

    Raises:
        FileNotFoundError: there is no manifest, or one of its files is missing.
        ValueError: the manifest is damaged, or a file does not match it.
    """

    is_shuffled = False

    def __init__(
        self, path: str | os.PathLike, *, verify: Verify = "auto", on_read: Callable[[int], None] | None = None
    ):
        if verify not in ("auto", "size", "sha256"):
            raise ValueError(f"verify is {verify!r}; it must be auto, size or sha256")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.tokenizer_size = self.manifest.tokenizer.size
        self.tokenizer_path = self.path / TOKENIZER_NAME
        self.eod_id = self.manifest.tokenizer.eod_id
        self.fingerprint = self.manifest.fingerprint
        check_sizes(self.path, self.manifest.files)
        check_indexes(self.path, self.manifest)
        if sha256_of(self.tokenizer_path) != self.manifest.tokenizer.sha256:
            raise ValueError(_differs(self.tokenizer_path))
        if verify != "size":
            check_hashes(self.path, self.manifest.files, trust_note=verify == "auto", on_read=on_read)
            if (size := tokenizer_size(load_tokenizer_file(self.tokenizer_path))) != self.tokenizer_size:
                raise ValueError(
                    f"{self.tokenizer_path}: has {size} ids, but {MANIFEST_NAME} says {self.tokenizer_size}; copy or "
                    "prepare the store again"
                )

    def split(self, name: str) -> TokenSequence:
        """Return the tokens of a split ("train" or "validation"), in manifest order."""
        if name not in self.manifest.splits:
            remedy, size = "", {"validation": "larger", "train": "smaller"}.get(name)
            if size is not None:
                divided = "or with the text divided into more documents"
                remedy = f"; prepare another folder with a {size} --validation-fraction, {divided}"
            raise ValueError(f"{self.path}: has no split {name!r}, only {', '.join(self.manifest.splits)}{remedy}")
        return self._sequence(self.manifest.splits[name].shards)

    def documents_of_set(self, split: str, set_name: str) -> TokenSequence:
        """Return the tokens of a set in a split, in manifest order.

        Raises:
            ValueError: there is no such set, or it is mixed with others in a shard.
        """
        self.split(split)
        found = self.manifest.splits[split]
        if set_name not in found.sets:
            raise ValueError(
                f"{self.path}: has no set {set_name!r} in the {split} split, only {', '.join(sorted(found.sets))}"
            )
        shard_sets = found.shard_sets
        if not shard_sets and len(found.sets) == 1:  # of an older version
            shard_sets = dict.fromkeys(found.shards, found.sets)
        shards = [shard for shard, sets in shard_sets.items() if set_name in sets]
        if not shards or any(len(shard_sets[shard]) > 1 for shard in shards):
            raise ValueError(
                f"{self.path}: documents of set {set_name!r} are in the same files as those of other sets; prepare it "
                "with --split-sets"
            )
        return self._sequence(shards)

    def document(self, split: str, number: int) -> np.ndarray:
        """Return document ``number`` of a split, from 0, with its end-of-document token.

        Raises:
            ValueError: there are not so many.
        """
        self.split(split)
        found = self.manifest.splits[split]
        if not 0 <= number < found.total.documents:
            raise ValueError(f"{self.path}: the {split} split has {found.total.documents:,} documents, numbered from 0")
        for shard in found.shards:
            size = read_index_header(self.path / f"{shard}.idx").num_sequences
            if number < size:
                return np.asarray(MegatronReader(self.path / shard)[number])
            number -= size
        raise AssertionError("the indexes were compared with the manifest")

    def _sequence(self, shards: list[str]) -> TokenSequence:
        paths = [self.path / f"{shard}.bin" for shard in shards]
        return TokenSequence(paths, np.dtype(self.manifest.dtype), vocab_size=self.tokenizer_size)


def check_sizes(store: Path, files: dict[str, FileInfo]) -> None:
    """Check that every file of the manifest exists and has the right size."""
    for name, info in files.items():
        path = store / name
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, but {MANIFEST_NAME} lists it; copy the store again")
        if (size := path.stat().st_size) != info.bytes:
            raise ValueError(f"{path}: {size} bytes instead of {info.bytes}; copy or prepare the store again")


def check_indexes(store: Path, manifest: Manifest) -> None:
    """Compare the header of every index with the manifest: dtype and number of documents."""
    for name, split in manifest.splits.items():
        num_documents = 0
        for shard in split.shards:
            path = store / f"{shard}.idx"
            header = read_index_header(path)
            if header.dtype != np.dtype(manifest.dtype):
                raise ValueError(
                    f"{path}: the tokens are {header.dtype}, but {MANIFEST_NAME} says {manifest.dtype}; copy or "
                    "prepare the store again"
                )
            counts = manifest.shard_counts(name, shard)
            if counts is not None and counts.documents != header.num_sequences:
                raise ValueError(_miscounted(path, header.num_sequences, counts.documents))
            num_documents += header.num_sequences
        if num_documents != split.total.documents:
            raise ValueError(_miscounted(store / name, num_documents, split.total.documents))


def _miscounted(path: Path, found: int, listed: int) -> str:
    return f"{path}: has {found} documents, but {MANIFEST_NAME} says {listed}; copy or prepare the store again"


def _differs(path: Path) -> str:
    return f"{path}: checksum differs from {MANIFEST_NAME}; copy or prepare the store again"


def check_hashes(
    store: Path, files: dict[str, FileInfo], *, trust_note: bool, on_read: Callable[[int], None] | None = None
) -> None:
    """Verify the checksums of all files, or of those changed since the last verification."""
    stamps = _stamps(store, files)
    notes = _read_notes(store) if trust_note else []
    names = [name for name in files if not any(note.get(name) == stamps[name] for note in notes)]
    if names and on_read:
        on_read(sum(files[name].bytes for name in names))
    for name, sha256 in zip(names, sha256_of_all(store / name for name in names), strict=True):
        if sha256 != files[name].sha256:
            raise ValueError(_differs(store / name))
    if names:
        _write_note(store, stamps)


def note_verified(store: Path, files: dict[str, FileInfo]) -> None:
    """Record that these files are intact, so that opening the store need not read them.

    The record ``.verified.json`` is in the store, or in the user's cache if the store cannot be
    written. It identifies each file by inode and change time, which no copy keeps (``cp -a`` keeps
    the modification time). So a copied or changed file is read again. Device numbers are not used:
    on network file systems they differ between machines.
    """
    _write_note(store, _stamps(store, files))


def _write_note(store: Path, stamps: dict[str, list]) -> None:
    for path in _note_paths(store):
        with contextlib.suppress(OSError):
            write_json(path, stamps)
            return


def _read_notes(store: Path) -> list[dict[str, list]]:
    notes = []
    for path in _note_paths(store):
        with contextlib.suppress(OSError, ValueError):
            notes.append(parse_json(path.read_bytes()))
    return [note for note in notes if isinstance(note, dict)]


def _note_paths(store: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(os.fsencode(store.resolve())).hexdigest()
    return store / VERIFIED_NAME, cache / "sinklm" / "verified" / f"{name}.json"


def _stamps(store: Path, files: dict[str, FileInfo]) -> dict[str, list]:
    """Return what identifies the content of each file: checksum, size, times in ns and inode."""
    stats = {name: (store / name).stat() for name in files}
    return {
        name: [files[name].sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        for name, stat in stats.items()
    }
