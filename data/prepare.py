"""Converts text to a token store: one process reads and writes, several processes tokenize.

Only a few batches are in memory at a time.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel
from tokenizers import Tokenizer

from ..files import FULL_DISK, atomic_file, locked, write_json
from .job import ShardJob
from .manifest import (
    MANIFEST_NAME,
    NOTES_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Counts,
    FileInfo,
    Manifest,
    Source,
    Split,
    TokenizerInfo,
)
from .megatron import token_dtype
from .readers import Shard
from .records import TEXT_KEY, Record
from .store import TokenStore, note_verified
from .tokenizer import DEFAULT_TOKENIZER, eod_id, tokenizer_size, training_tokenizer
from .tokenizing import TokenizedBatch, put_records, start_process, take_result, tokenize

BATCH_BYTES = 2**18
COMMIT_SECONDS = 10.0


class Settings(BaseModel):
    """Settings that must not change when an interrupted preparation resumes."""

    tokenizer_sha256: str
    validation_fraction: float
    sources: list[str]
    # The defaults are what older versions used, whose files lack these keys.
    text_key: str = TEXT_KEY
    eod_id: int | None = None  # None: that of `eod_id(tokenizer)`
    split_sets: bool = False


class PrepareProgress(NamedTuple):
    """Progress of a preparation, including the work of earlier runs.

    ``counts`` covers everything tokenized so far. ``source_bytes`` is the input read so far, in
    bytes on disk (compressed), out of ``total_source_bytes``, which is None if a size is not known.
    """

    shard_name: str
    counts: Counts
    source_bytes: int
    total_source_bytes: int | None


def prepare_store(
    shards: list[Shard],
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike = DEFAULT_TOKENIZER,
    eod_token: str | None = None,
    validation_fraction: float = 0.01,
    split_sets: bool = False,
    num_processes: int | None = None,
    report: Callable[[PrepareProgress], None] = lambda progress: None,
) -> Manifest:
    """Tokenize the documents of ``shards`` into a token store.

    After an interruption, call it again with the same arguments: it resumes and produces the same
    bytes as an uninterrupted run. On a finished store it does nothing.

    Args:
        shards: the inputs, see :func:`find_inputs`.
        output: folder of the store; new, empty, or from an earlier run with the same settings. If
            the earlier run saved no work, the settings may differ.
        tokenizer: Hub name, or path of a ``tokenizer.json`` or of its folder. The store has a copy
            without truncation, padding and template, see :func:`training_tokenizer`.
        eod_token: the token that ends each document; None: see :func:`eod_id`.
        validation_fraction: share of documents in the validation split, chosen by hash.
        split_sets: give each set of a shard files of its own, for training with ``data.weights``.
        num_processes: number of tokenizing processes; None: one for each processor.
        report: called after each batch.

    Raises:
        ValueError: bad input (the message names file and line), or an output folder made with other
            settings.
        OSError: a file or the tokenizer is missing, or the disk is full; all saved work is kept.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1")
    store = Path(output)
    encoder = training_tokenizer(tokenizer)
    info = TokenizerInfo(
        sha256=hashlib.sha256(encoder.content).hexdigest(),
        size=tokenizer_size(encoder.tokenizer),
        eod_id=eod_id(encoder.tokenizer, eod_token),
    )
    settings = Settings(
        tokenizer_sha256=info.sha256,
        validation_fraction=validation_fraction,
        sources=[shard.name for shard in shards],
        text_key=shards[0].text_key,
        eod_id=info.eod_id,
        split_sets=split_sets,
    )
    if (store / MANIFEST_NAME).exists():
        return _finished_store(store, settings, shards)
    with _explain_full_disk(store), _claim(store, settings, encoder.tokenizer) as notes:
        with atomic_file(store / TOKENIZER_NAME, binary=True) as file:
            file.write(encoder.content)
        manifest = _tokenize_all(store, notes, info, settings, shards, num_processes or num_processors(), report)
        write_json(store / MANIFEST_NAME, manifest.model_dump(), ensure_ascii=False)
        note_verified(store, manifest.files)
        shutil.rmtree(notes)
    return manifest


def has_saved_work(store: Path) -> bool:
    """Whether an unfinished preparation saved work that can be resumed."""
    return any((store / NOTES_NAME).glob("[0-9]*.json"))


def num_processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished_store(store: Path, settings: Settings, shards: list[Shard]) -> Manifest:
    manifest = TokenStore(store, verify="size").manifest
    made_with = Settings(
        tokenizer_sha256=manifest.tokenizer.sha256,
        validation_fraction=manifest.validation_fraction,
        sources=[source.name for source in manifest.sources],
        text_key=manifest.text_key,
        eod_id=manifest.tokenizer.eod_id,
        split_sets=manifest.split_sets,
    )
    _check_same(store, made_with, settings)
    for source, shard in zip(manifest.sources, shards, strict=True):
        if source.bytes != shard.num_bytes:
            raise ValueError(
                f"{store}: already complete, but {source.name} now has {shard.num_bytes} bytes instead of "
                f"{source.bytes}; delete the folder or choose another --output"
            )
    shutil.rmtree(store / NOTES_NAME, ignore_errors=True)
    return manifest


def _check_same(store: Path, before: Settings, now: Settings) -> None:
    for key, value in now:
        if (old := getattr(before, key)) != value:
            raise ValueError(
                f"{store}: was started with other settings ({key}: {_brief(old)} then, {_brief(value)} now); "
                "use the same settings, delete the folder, or choose another --output"
            )


def _brief(value: object) -> str:
    return f"{len(value)} inputs {', '.join(value)}"[:200] if isinstance(value, list) else str(value)


@contextlib.contextmanager
def _claim(store: Path, settings: Settings, tokenizer: Tokenizer) -> Iterator[Path]:
    """Create or reopen the output folder and lock it; yields the folder of the notes."""
    notes = store / NOTES_NAME
    if store.is_file():
        raise ValueError(f"{store}: is a file; --output must be a folder")
    if store.exists() and not notes.exists() and any(store.iterdir()):
        raise ValueError(f"{store}: is neither empty nor a token store; choose another --output")
    notes.mkdir(parents=True, exist_ok=True)
    with locked(notes / "lock", busy=f"{store}: in use by another `sinklm prepare`; wait for it or stop it"):
        path = notes / "settings.json"
        if has_saved_work(store):
            before = Settings.model_validate_json(path.read_bytes())
            if before.eod_id is None and before.tokenizer_sha256 == settings.tokenizer_sha256:
                before.eod_id = eod_id(tokenizer)
            _check_same(store, before, settings)
        else:
            write_json(path, settings.model_dump(), ensure_ascii=False)
        yield notes


@contextlib.contextmanager
def _explain_full_disk(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(
            f"{store}: no space left to write ({os.strerror(error.errno)}); finished work is kept: free some space "
            "and run the same command again"
        ) from error


def _tokenize_all(
    store: Path,
    notes: Path,
    info: TokenizerInfo,
    settings: Settings,
    shards: list[Shard],
    num_processes: int,
    report: Callable[[PrepareProgress], None],
) -> Manifest:
    """Write the files of all shards that are not finished, and describe those of all."""
    dtype = token_dtype(info.size)
    jobs = [ShardJob(store, notes, i, shard, dtype, settings.split_sets) for i, shard in enumerate(shards)]
    start = (str(store / TOKENIZER_NAME), info.eod_id, dtype, settings.validation_fraction, settings.split_sets)
    _run(jobs, notes, num_processes, start, report)
    return _manifest(store, info, dtype, settings, jobs)


def _run(
    jobs: list[ShardJob], notes: Path, num_processes: int, start: tuple, report: Callable[[PrepareProgress], None]
) -> None:
    """Run the unfinished jobs in order."""
    for job in jobs:
        job.shard.position = job.shard.num_bytes or 0 if job.state.is_finished else 0
    open_jobs = [job for job in jobs if not job.state.is_finished]
    sizes = [job.shard.num_bytes for job in jobs]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    done = Counts()
    for job in jobs:
        for split in SPLITS:
            done.add(job.state.total(split))
    committed_at = time.monotonic()
    context = get_context("spawn")
    stop, running = context.Pipe(duplex=False)  # closing `running` ends the processes at once
    pool = ProcessPoolExecutor(num_processes, context, start_process, (stop, *start))
    try:
        for job, batch in _tokenized(pool, open_jobs, notes, max_waiting=2 * num_processes + 2):
            if batch is None:
                job.finish()
                continue
            job.add(batch)
            for part in batch.parts.values():
                for counts in part.sets.values():
                    done.add(counts)
            if time.monotonic() > committed_at + COMMIT_SECONDS:
                job.commit()
                committed_at = time.monotonic()
            report(PrepareProgress(job.shard.name, done.model_copy(), sum(job.shard.position for job in jobs), total))
    except BrokenProcessPool as error:
        raise OSError(
            "a tokenizing process was killed, possibly out of memory; run again with fewer --processes"
        ) from error
    except BaseException:  # an error or Ctrl-C: no result of a running process is used any more
        running.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for job in open_jobs:
            job.close()


def _tokenized(
    pool: ProcessPoolExecutor, jobs: list[ShardJob], notes: Path, max_waiting: int
) -> Iterator[tuple[ShardJob, TokenizedBatch | None]]:
    """Yield the tokenized batches of all jobs in order, and None at the end of each job.

    At most ``max_waiting`` batches are read ahead, and fewer if they are larger than usual. An
    error in reading or writing one is raised after the batches before it.
    """
    waiting: deque[tuple[ShardJob, Future | Exception | None, int]] = deque()
    batches = (notes / f"batch-{number}" for number in itertools.count())
    work = _work(jobs)
    while True:
        num_bytes = sum(size for _, _, size in waiting)
        while len(waiting) < max_waiting and num_bytes < 2 * BATCH_BYTES * max_waiting:
            if (found := next(work, None)) is None:
                break
            job, item = found
            if not isinstance(item, list):
                waiting.append((job, item, 0))
                continue
            size = sum(record.num_bytes for record in item)
            try:
                waiting.append((job, pool.submit(tokenize, put_records(item, next(batches))), size))
            except OSError as error:
                waiting.append((job, error, 0))
                work = iter(())
            num_bytes += size
        if not waiting:
            return
        job, result, _ = waiting.popleft()
        if isinstance(result, Exception):
            raise result
        yield job, take_result(result.result()) if result else None


def _work(jobs: list[ShardJob]) -> Iterator[tuple[ShardJob, list[Record] | Exception | None]]:
    for job in jobs:
        try:
            for batch in _batches(job.shard.read(skip=job.state.num_records)):
                yield job, batch
        except (ValueError, OSError) as error:
            yield job, error
            return
        yield job, None


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, num_bytes = [], 0
    for record in records:
        batch.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _manifest(store: Path, info: TokenizerInfo, dtype: np.dtype, settings: Settings, jobs: list[ShardJob]) -> Manifest:
    path = store / TOKENIZER_NAME
    files = {TOKENIZER_NAME: FileInfo(bytes=path.stat().st_size, sha256=info.sha256)}
    splits = {split: Split(total=Counts(), sets={}, shards=[]) for split in SPLITS}
    for job in jobs:
        files.update(job.state.files or {})
        for name, split in splits.items():
            split.total.add(job.state.total(name))
            for set_name, counts in job.state.sets[name].items():
                split.sets.setdefault(set_name, Counts()).add(counts)
        for part, shard in job.parts().items():
            if f"{shard}.bin" in files:
                sets = job.state.sets[part.split]
                split = splits[part.split]
                split.shards.append(shard)
                split.shard_sets[shard] = sets if part.set_name is None else {part.set_name: sets[part.set_name]}
    for split in splits.values():
        split.shards.sort()
        split.shard_sets = {shard: split.shard_sets[shard] for shard in split.shards}
    return Manifest(
        tokenizer=info,
        dtype="uint16" if dtype == np.uint16 else "int32",
        validation_fraction=settings.validation_fraction,
        text_key=settings.text_key,
        split_sets=settings.split_sets,
        sources=[Source(**job.state.model_dump(include=set(Source.model_fields))) for job in jobs],
        splits={name: split for name, split in splits.items() if split.shards},
        files=files,
    )
