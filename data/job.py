"""One shard of a running preparation: its two pairs of files and its progress note on disk.

The note records how many records are done and the size of their data in the partial files. It is
replaced atomically after the files are flushed to disk. When a crashed job resumes, data beyond the
note is dropped, so the finished shard is byte-identical to that of an uninterrupted run.
"""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from ..files import write_json
from .inputs import no_document
from .manifest import SPLITS, Counts, FileInfo, sha256_of
from .megatron import MegatronWriter
from .readers import Shard
from .tokenizing import TokenizedBatch


class JobState(BaseModel):
    """The progress note: ``sets`` counts by split and Pile set, ``files`` is set when finished."""

    name: str
    bytes: int | None
    num_records: int = 0
    num_empty_files: int = 0
    sets: dict[str, dict[str, Counts]] = {split: {} for split in SPLITS}
    files: dict[str, FileInfo] | None = None

    @property
    def is_finished(self) -> bool:
        return self.files is not None

    def total(self, split: str) -> Counts:
        total = Counts()
        for counts in self.sets[split].values():
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

    Raises:
        ValueError: the shard is finished, but its input has changed since.
    """

    def __init__(self, store: Path, notes: Path, index: int, shard: Shard, dtype: np.dtype):
        self.store, self.shard, self.dtype = store, shard, dtype
        self.stem = f"{index:05d}"
        self.note_path = notes / f"{self.stem}.json"
        self.state = self._read_note()
        self._writers: dict[str, MegatronWriter] = {}

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
        totals = {split: state.total(split) for split in SPLITS}
        return all(
            MegatronWriter.can_go_on(self.store / split / self.stem, self.dtype, total.documents, total.tokens)
            for split, total in totals.items()
        )

    def add(self, batch: TokenizedBatch) -> None:
        """Append the next records."""
        for split, part in batch.parts.items():
            self._writer(split).add(part.tokens, part.lengths)
            for name, counts in part.sets.items():
                self.state.sets[split].setdefault(name, Counts()).add(counts)
        self.state.num_records += batch.num_records
        self.state.num_empty_files += batch.num_empty_files

    def _writer(self, split: str) -> MegatronWriter:
        if not self._writers:  # nothing was added since the note was read, so its totals match the files
            for name in SPLITS:
                (self.store / name).mkdir(exist_ok=True)
                total = self.state.total(name)
                self._writers[name] = MegatronWriter(
                    self.store / name / self.stem, self.dtype, num_documents=total.documents, num_tokens=total.tokens
                )
        return self._writers[split]

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
        for split in SPLITS:
            self._writer(split).finish()
            for name in (f"{split}/{self.stem}.bin", f"{split}/{self.stem}.idx"):
                if (path := self.store / name).exists():
                    files[name] = FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
        self._writers.clear()
        self.state.files = files
        write_json(self.note_path, self.state.model_dump(), ensure_ascii=False)

    def close(self) -> None:
        """Close the files of an unfinished shard."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
