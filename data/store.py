"""The token store: tokenized documents as Megatron file pairs, described by a manifest."""

import contextlib
import json
import os
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from ..files import write_json
from .manifest import MANIFEST_NAME, TOKENIZER_NAME, FileInfo, read_manifest, sha256_of_all
from .megatron import map_tokens

VERIFIED_NAME = ".verified.json"
Verify = Literal["auto", "size", "sha256"]


class TokenSequence:
    """The tokens of several files, concatenated. ``len()`` is in tokens.

    Args:
        paths: the ``.bin`` files, in order.
        dtype: dtype of the tokens in them.
        row_length: length of a row if the data consists of rows (pre-shuffled files).
    """

    def __init__(self, paths: list[Path], dtype: np.dtype, row_length: int | None = None):
        self.paths, self.dtype, self.row_length = paths, np.dtype(dtype), row_length
        sizes = [path.stat().st_size // self.dtype.itemsize for path in paths]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._maps: list[np.ndarray | None] = [None] * len(paths)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict:
        # Pickling a memory map would copy all its data.
        return {**self.__dict__, "_maps": [None] * len(self.paths)}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of the tokens ``start … stop - 1``, int64 ``(stop - start,)``."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} are out of range; the sequence has {len(self)} tokens")
        tokens = np.empty(stop - start, np.int64)
        file = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(tokens):
            begin = start + filled - int(self.starts[file])
            piece = self._map(file)[begin : begin + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            file += 1
        return tokens

    def _map(self, file: int) -> np.ndarray:
        tokens = self._maps[file]
        if tokens is None:
            tokens = self._maps[file] = map_tokens(self.paths[file], self.dtype)
        return tokens


class TokenSource(Protocol):
    """What training requires of :class:`TokenStore` and :class:`PreshuffledStore`."""

    path: Path
    tokenizer_size: int
    tokenizer_path: Path
    eod_id: int
    fingerprint: str
    is_shuffled: bool

    def split(self, name: str) -> TokenSequence: ...


class TokenStore:
    """A folder made by ``sinklm prepare``, opened for reading.

    Args:
        path: the folder.
        verify: how files are checked against the manifest. "size" checks that every file exists and
            has the right size; "sha256" also reads every file; "auto" also reads the files whose
            size or modification time changed since they were last verified (recorded in
            ``.verified.json``).

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

    def __init__(self, path: str | os.PathLike, *, verify: Verify = "auto"):
        if verify not in ("auto", "size", "sha256"):
            raise ValueError(f"verify is {verify!r}; it must be auto, size or sha256")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.tokenizer_size = self.manifest.tokenizer.size
        self.tokenizer_path = self.path / TOKENIZER_NAME
        self.eod_id = self.manifest.tokenizer.eod_id
        self.fingerprint = self.manifest.fingerprint
        check_sizes(self.path, self.manifest.files)
        if verify != "size":
            check_hashes(self.path, self.manifest.files, trust_note=verify == "auto")

    def split(self, name: str) -> TokenSequence:
        """Return the tokens of a split ("train" or "validation"), in manifest order."""
        if name not in self.manifest.splits:
            raise ValueError(f"{self.path}: has no split {name!r}, only {', '.join(self.manifest.splits)}")
        shards = self.manifest.splits[name].shards
        return TokenSequence([self.path / f"{shard}.bin" for shard in shards], np.dtype(self.manifest.dtype))


def check_sizes(store: Path, files: dict[str, FileInfo]) -> None:
    """Check that every file of the manifest exists and has the right size."""
    for name, info in files.items():
        path = store / name
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing, but {MANIFEST_NAME} lists it; copy the store again")
        if (size := path.stat().st_size) != info.bytes:
            raise ValueError(f"{path}: {size} bytes instead of {info.bytes}; copy or prepare the store again")


def check_hashes(store: Path, files: dict[str, FileInfo], *, trust_note: bool) -> None:
    """Verify the checksums of all files, or of those changed since the last verification."""
    stamps = _stamps(store, files)
    noted = _read_note(store) if trust_note else {}
    names = [name for name in files if noted.get(name) != stamps[name]]
    for name, sha256 in zip(names, sha256_of_all(store / name for name in names), strict=True):
        if sha256 != files[name].sha256:
            raise ValueError(f"{store / name}: checksum differs from {MANIFEST_NAME}; copy or prepare the store again")
    if names:
        note_verified(store, files)


def note_verified(store: Path, files: dict[str, FileInfo]) -> None:
    """Record that these files are intact. Without write access they are read again next time."""
    with contextlib.suppress(OSError):
        write_json(store / VERIFIED_NAME, _stamps(store, files))


def _read_note(store: Path) -> dict[str, list]:
    try:
        return json.loads((store / VERIFIED_NAME).read_bytes())
    except (OSError, ValueError):
        return {}


def _stamps(store: Path, files: dict[str, FileInfo]) -> dict[str, list]:
    """Return for each file its expected checksum, its size and its modification time in ns."""
    stats = {name: (store / name).stat() for name in files}
    return {name: [files[name].sha256, stats[name].st_size, stats[name].st_mtime_ns] for name in files}
