"""One shard of a running preparation: its two pairs of files, and the note on disk from which it can go on.

The note says how many records are done and how much of the partial files belongs to them; it is replaced in one
step, after the files are safe. What stands behind that in the files after a crash is dropped, so the shard comes out
the same, byte for byte, as if nothing had happened.
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
    """The note. ``sets`` counts what is done by split and Pile set; ``files`` is known once the shard is finished."""

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
    """Prepares one shard, from where an earlier run left it.

    Args:
        store: the output folder.
        notes: folder of the notes.
        index: the shard's number, which names its files.
        shard: the input.
        dtype: of the tokens.

    Raises:
        ValueError: the shard is finished, but its input is another one now.
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
                f"{self.store}: shard {self.stem} was made from {state.name} of {state.bytes} bytes, which has "
                f"{fresh.bytes} now; delete the folder or choose another --output"
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
        if not self._writers:  # so nothing was added since the note was read: its totals are what the files hold
            for name in SPLITS:
                (self.store / name).mkdir(exist_ok=True)
                total = self.state.total(name)
                self._writers[name] = MegatronWriter(
                    self.store / name / self.stem, self.dtype, num_documents=total.documents, num_tokens=total.tokens
                )
        return self._writers[split]

    def commit(self) -> None:
        """Make all that was added safe against a crash."""
        for writer in self._writers.values():
            writer.commit()
        write_json(self.note_path, self.state.model_dump(), ensure_ascii=False)

    def finish(self) -> None:
        """Complete the shard's files.

        Raises:
            ValueError: there was no document in it.
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
        """Let go of the files of an unfinished shard."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
