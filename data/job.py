"""One shard of a running preparation: its pairs of files and its progress note on disk.

The note records how many records are done and the size of their data in the partial files. It is
replaced atomically after the files are flushed to disk. When a crashed job resumes, data beyond the
note is dropped, so the finished shard is byte-identical to that of an uninterrupted run.
"""

import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, ValidationError

from ..files import PARTIAL, partial_name, write_json
from .inputs import no_document
from .manifest import SPLITS, Counts, FileInfo, sha256_of
from .megatron import MegatronWriter
from .readers import Shard
from .tokenizing import Part, TokenizedBatch

MAX_PARTS = 200  # each has two open files
MAX_NAME_BYTES = 200


class JobState(BaseModel):
    """The progress note: ``sets`` counts by split and Pile set, ``files`` is set when finished."""

    name: str
    bytes: int | None
    num_records: int = 0
    num_empty_files: int = 0
    num_unknown: int = 0
    sets: dict[str, dict[str, Counts]] = {split: {} for split in SPLITS}
    files: dict[str, FileInfo] | None = None

    @property
    def is_finished(self) -> bool:
        return self.files is not None

    def total(self, split: str, set_name: str | None = None) -> Counts:
        """Return the counts of a split, or of one set in it."""
        total = Counts()
        for name, counts in self.sets[split].items():
            if set_name in (None, name):
                total.add(counts)
        return total


class ShardJob:
    """Prepares one shard and resumes the work of an earlier run.

    Args:
        store: the output folder.
        notes: the folder of the progress notes.
        index: the shard's number, used as its file name.
        shard: the input.
        dtype: dtype of the tokens.
        split_sets: whether the documents of each set are a pair of files of their own.

    Raises:
        ValueError: the shard is finished, but its input has changed since.
    """

    def __init__(self, store: Path, notes: Path, index: int, shard: Shard, dtype: np.dtype, split_sets: bool = False):
        self.store, self.shard, self.dtype, self.split_sets = store, shard, dtype, split_sets
        self.stem = f"{index:05d}"
        self.note_path = notes / f"{self.stem}.json"
        self.state = self._read_note()
        self._writers: dict[Part, MegatronWriter] = {}

    def parts(self, state: JobState | None = None) -> dict[Part, str]:
        """Return the parts known so far and the relative paths of their files, without suffix."""
        if not self.split_sets:
            return {Part(split): f"{split}/{self.stem}" for split in SPLITS}
        parts = [Part(split, name) for split in SPLITS for name in (state or self.state).sets[split]]
        return {part: self._path_of(part) for part in sorted(parts)}

    def _path_of(self, part: Part) -> str:
        suffix = "" if part.set_name is None else f".{quote(part.set_name, safe='')}"
        return f"{part.split}/{self.stem}{suffix}"

    def _read_note(self) -> JobState:
        fresh = JobState(name=self.shard.name, bytes=self.shard.num_bytes)
        try:
            state = JobState.model_validate_json(self.note_path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return fresh
        is_same = (state.name, state.bytes) == (fresh.name, fresh.bytes)
        if state.is_finished and not is_same:
            raise ValueError(
                f"{self.store}: shard {self.stem} was made from {state.name} with {state.bytes} bytes, but the input "
                f"is now {fresh.name} with {fresh.bytes} bytes; delete the folder or choose another --output"
            )
        if not state.is_finished and not (is_same and self._has_partial_files(state)):
            return fresh
        return state

    def _has_partial_files(self, state: JobState) -> bool:
        return all(
            MegatronWriter.can_go_on(self.store / path, self.dtype, total.documents, total.tokens)
            for part, path in self.parts(state).items()
            for total in [state.total(*part)]
        )

    def add(self, batch: TokenizedBatch) -> None:
        """Append the next records."""
        for key, part in batch.parts.items():
            self._writer(key).add(part.tokens, part.lengths)
            for name, counts in part.sets.items():
                self.state.sets[key.split].setdefault(name, Counts()).add(counts)
        self.state.num_records += batch.num_records
        self.state.num_empty_files += batch.num_empty_files
        self.state.num_unknown += batch.num_unknown

    def _writer(self, part: Part) -> MegatronWriter:
        if not self._writers:  # nothing was added since the note was read, so its totals match the files
            for name in SPLITS:
                (self.store / name).mkdir(exist_ok=True)
            for known, path in self.parts().items():
                self._open(known, path)
        if part not in self._writers:
            self._open(part, self._path_of(part))
        return self._writers[part]

    def _open(self, part: Part, path: str) -> None:
        if len(self._writers) >= MAX_PARTS or len(os.fsencode(Path(path).name)) > MAX_NAME_BYTES:
            raise ValueError(
                f"{self.shard.name}: set {str(part.set_name)[:80]!r} cannot be a file of its own: a shard has at most "
                f"{MAX_PARTS // 2} sets, with names of at most {MAX_NAME_BYTES} bytes; prepare it without --split-sets"
            )
        total = self.state.total(*part)
        self._writers[part] = MegatronWriter(
            self.store / path, self.dtype, num_documents=total.documents, num_tokens=total.tokens
        )

    def commit(self) -> None:
        """Flush everything added so far to disk and update the note."""
        for writer in self._writers.values():
            writer.commit()
        write_json(self.note_path, self.state.model_dump(), ensure_ascii=False)

    def finish(self) -> None:
        """Complete the shard's files.

        Raises:
            ValueError: the shard contains no document.
        """
        if not any(self.state.total(split).documents for split in SPLITS):
            raise no_document(self.shard)
        files = {}
        for part, prefix in self.parts().items():
            self._writer(part).finish()
            for name in (f"{prefix}.bin", f"{prefix}.idx"):
                if (path := self.store / name).exists():
                    files[name] = FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
        self._writers.clear()
        for split in SPLITS:  # of a set that the input no longer has
            for name in (f"{self.stem}.*{PARTIAL}", partial_name(f"{self.stem}.*")):
                for path in (self.store / split).glob(name):
                    path.unlink()
        self.state.files = files
        write_json(self.note_path, self.state.model_dump(), ensure_ascii=False)

    def close(self) -> None:
        """Close the files of an unfinished shard."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
