"""The work of one tokenizing process: converts batches of raw records to token ids and counts."""

import hashlib
import os
import pickle
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..rust import is_panic, silent_stderr
from ..text import one_line
from .manifest import Counts
from .records import Record
from .tokenizer import cut_text, cuts_at_spaces, load_tokenizer_file, unknown_id

PIECE_LENGTH = 2**17  # characters; tokenizers needs about 130 bytes for each of them while encoding
MAX_PIECE_LENGTH = 2**24  # characters of a text without a place to cut; 2 GB
OTHER_SPLIT, HELD_OUT_SPLIT = "train", "validation"


@dataclass
class SplitPart:
    """A batch's part of one split: tokens ``(num_tokens,)``, document lengths, counts by set."""

    tokens: np.ndarray
    lengths: list[int]
    sets: dict[str, Counts]


class Part(NamedTuple):
    """A pair of files of a shard: a split, or the documents of one set in it."""

    split: str
    set_name: str | None = None


class TokenizedBatch(NamedTuple):
    parts: dict[Part, SplitPart]
    num_records: int
    num_empty_files: int
    num_unknown: int


@dataclass
class DocumentTokenizer:
    """Converts records to tokens; each process has one.

    Args:
        tokenizer: from :func:`load_tokenizer_file`.
        eod_id: id appended to each document.
        dtype: dtype of the tokens.
        validation_fraction: share of documents held out, see :func:`is_held_out`.
        split_sets: whether each set is a part of its own.
    """

    tokenizer: Tokenizer
    eod_id: int
    dtype: np.dtype
    validation_fraction: float
    split_sets: bool = False
    piece_length: int | None = field(init=False)
    unknown_id: int | None = field(init=False)

    def __post_init__(self):
        self.unknown_id = unknown_id(self.tokenizer)
        self.piece_length = PIECE_LENGTH if cuts_at_spaces(self.tokenizer) else None

    def __call__(self, records: list[Record]) -> TokenizedBatch:
        tokens: dict[Part, list[np.ndarray]] = {}
        parts: dict[Part, SplitPart] = {}
        num_empty_files = 0
        for record in records:
            document = record.document()
            if document is None:
                num_empty_files += 1
                continue
            content = document.text.encode()
            split = HELD_OUT_SPLIT if is_held_out(content, self.validation_fraction) else OTHER_SPLIT
            key = Part(split, document.set_name if self.split_sets else None)
            part = parts.setdefault(key, SplitPart(np.empty(0), [], {}))
            ids = self.encode(document.text, record.place)
            tokens.setdefault(key, []).append(ids)
            part.lengths.append(len(ids))
            counts = Counts(documents=1, tokens=len(ids), bytes=len(content))
            part.sets.setdefault(document.set_name, Counts()).add(counts)
        for key, part in parts.items():
            part.tokens = np.concatenate(tokens[key])
        num_unknown = sum(map(self._num_unknown, parts.values()))
        return TokenizedBatch(parts, len(records), num_empty_files, num_unknown)

    def _num_unknown(self, part: SplitPart) -> int:
        if self.unknown_id is None:
            return 0
        num_ends = len(part.lengths) if self.unknown_id == self.eod_id else 0
        return int(np.count_nonzero(part.tokens == self.unknown_id)) - num_ends

    def encode(self, text: str, place: str) -> np.ndarray:
        """Return the ids of a document and the end-of-document id, ``(num_tokens + 1,)``.

        Args:
            place: where the text is from, for messages.

        No other special token is added. If the text contains a special token's name, it becomes
        that token, as in Pythia's data.

        Raises:
            ValueError: a part of the text is too long for encoding it at once, or the tokenizer
                fails on it.
        """
        pieces = [text] if self.piece_length is None else cut_text(text, self.piece_length)
        arrays = []
        if (longest := max(map(len, pieces))) > MAX_PIECE_LENGTH:
            raise ValueError(
                f"{place}: {longest:,} characters in which this tokenizer allows no cut; at most "
                f"{MAX_PIECE_LENGTH:,} are encoded at once: split or remove this document"
            )
        for piece in pieces:
            try:
                (encoding,) = self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            except BaseException as error:  # tokenizers raises a bare Exception, or panics
                if not (isinstance(error, Exception) or is_panic(error)):
                    raise
                raise ValueError(
                    f"{place}: the tokenizer fails on this document ({one_line(str(error))}): its tokenizer.json is "
                    "damaged, or not made for this text"
                ) from None
            arrays.append(np.array(encoding.ids, dtype=self.dtype))
        return np.concatenate([*arrays, np.array([self.eod_id], dtype=self.dtype)])


def is_held_out(content: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split.

    This depends only on its UTF-8 bytes and the fraction: identical documents are in the same
    split, and a larger fraction holds out a superset of the documents.
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


_work: DocumentTokenizer | None = None


def start_process(stop: Connection, tokenizer_file: str, *settings: Any) -> None:
    """Initialize this process for :func:`tokenize`.

    Args:
        settings: those of :class:`DocumentTokenizer`.
        stop: a pipe from the main process. When its other end is closed, this process exits, even
            in the middle of a document.
    """
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_exit_at_end_of, args=(stop,), daemon=True).start()
    _work = DocumentTokenizer(load_tokenizer_file(tokenizer_file), *settings)


def _exit_at_end_of(stop: Connection) -> None:
    """Exit when the pipe closes, which it also does when the main process is killed."""
    stop.poll(None)
    os._exit(1)


def put_records(records: list[Record], batch: Path) -> Path:
    """Write a batch to a file, for :func:`tokenize`.

    Neither records nor results are sent through the pipes of ``ProcessPoolExecutor``. If a process
    is killed while more than a pipe's buffer is sent, it waits indefinitely: for the rest of a
    result, and in the first versions of Python 3.11 also for a reader of records.
    """
    batch.write_bytes(pickle.dumps(records))
    return batch


def tokenize(batch: Path) -> Path:
    """Replace the records in a file by the result, for :func:`take_result`."""
    assert _work is not None
    records = pickle.loads(batch.read_bytes())
    with silent_stderr():  # panics of the tokenizer
        result = _work(records)
    batch.write_bytes(pickle.dumps(result))
    return batch


def take_result(batch: Path) -> TokenizedBatch:
    """Read and delete the file that :func:`tokenize` wrote."""
    result = pickle.loads(batch.read_bytes())
    batch.unlink()
    return result
