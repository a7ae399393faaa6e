"""Training samples in an order of Megatron-LM or GPT-NeoX, such as those of PolyPythias.

The folder contains one ``.bin``/``.idx`` pair of all documents, a ``tokenizer.json``, and the three
arrays that GPT-NeoX's ``GPT2Dataset`` caches for a seed (``…_doc_idx.npy``, ``…_sample_idx.npy``,
``…_shuffle_idx.npy``). They are used as they are, as in ``megatron/data/gpt2_dataset.py`` of
EleutherAI/gpt-neox.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .fixed_order import NUM_PROBES, FixedOrderStore
from .megatron import MegatronReader
from .sequence import ArrayFile, check_ids

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")
MISMATCH = "use the documents that the order was made for"


class OrderedRows:
    """The samples of an order as rows behind each other, with the interface of `TokenSequence`.

    Row i is sample ``shuffle_idx[i]``: the tokens from place ``sample_idx[…]`` of the documents
    ``doc_idx`` to the next place, and one more.

    Args:
        reader: the documents.
        arrays: ``doc_idx`` ``(num_documents · epochs,)``; ``sample_idx`` ``(num_samples + 1, 2)``,
            places in ``doc_idx`` and tokens in that document; ``shuffle_idx``.
        vocab_size: the number of ids of the tokenizer.
    """

    def __init__(self, path: Path, reader: MegatronReader, arrays: dict[str, ArrayFile], *, vocab_size: int):
        self.path, self.reader, self.vocab_size = path, reader, vocab_size
        self.doc_idx, self.sample_idx, self.shuffle_idx = (arrays[name] for name in ARRAYS)
        self.num_rows = min(len(self.shuffle_idx), len(self.sample_idx) - 1)
        if (
            self.num_rows < 1
            or self.doc_idx.ndim != 1
            or self.sample_idx.shape[1:] != (2,)
            or self.shuffle_idx.ndim != 1
        ):
            raise ValueError(f"{path}: the arrays {', '.join(ARRAYS)} are not those of an order; copy them again")
        self.row_length = len(self._sample(0))

    def __len__(self) -> int:
        return self.num_rows * self.row_length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens ``start … stop - 1`` of the rows, int64 ``(stop - start,)``.

        Raises:
            IndexError: there are fewer tokens.
            ValueError: the arrays do not belong to the documents, or a token is no id.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} are out of range; the rows have {len(self)} tokens")
        first, last = start // self.row_length, -(-stop // self.row_length)
        rows = [self._row(i) for i in range(first, last)]
        begin = start - first * self.row_length
        return np.concatenate([np.empty(0, np.int64), *rows])[begin : begin + stop - start]

    def _row(self, i: int) -> np.ndarray:
        tokens = self._sample(int(self.shuffle_idx[i]))
        if len(tokens) != self.row_length:
            raise ValueError(f"{self.path}: row {i} has {len(tokens)} tokens instead of {self.row_length}; {MISMATCH}")
        check_ids(tokens, self.vocab_size, self.path, 0)
        return tokens.astype(np.int64)

    def _sample(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self.sample_idx) - 1:
            raise ValueError(f"{self.path}: shuffle_idx contains {number}, which sample_idx does not have; {MISMATCH}")
        (first, begin), (last, end) = self.sample_idx[number : number + 2].tolist()
        if not 0 <= first <= last < len(self.doc_idx):
            raise ValueError(f"{self.path}: sample_idx contains places that doc_idx does not have; {MISMATCH}")
        numbers = self.doc_idx[first : last + 1].tolist()
        if not all(0 <= document < len(self.reader) for document in numbers):
            raise ValueError(f"{self.path}: doc_idx contains documents that the .idx file does not have; {MISMATCH}")
        parts = [self.reader[document] for document in numbers]
        parts[-1] = parts[-1][: end + 1]
        parts[0] = parts[0][begin:]
        return np.concatenate(parts)


class MegatronOrderStore(FixedOrderStore[OrderedRows]):
    """A folder of documents and an order of samples. See :class:`FixedOrderStore`.

    The fingerprint covers the tokenizer, the names and sizes of the files, and 64 samples spread
    over the order.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the arrays do not belong to the documents, or contain ids outside the
            tokenizer's vocabulary.
    """

    contents = "an order of Megatron"

    def _open(self) -> OrderedRows:
        files = {name: self._only(f"*_{name}.npy") for name in ARRAYS}
        documents = self._only("*.bin")
        self._files = [documents, documents.with_suffix(".idx"), *files.values()]
        reader = MegatronReader(documents.with_suffix(""), check=False)
        arrays = {name: _load(file) for name, file in files.items()}
        return OrderedRows(self.path, reader, arrays, vocab_size=self.tokenizer_size)

    def _only(self, pattern: str) -> Path:
        found = sorted(self.path.glob(pattern))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{self.path}: has {len(found)} files {pattern}; an order of Megatron needs exactly one, beside "
                f"{', '.join(f'*_{name}.npy' for name in ARRAYS)}, *.bin and *.idx"
            )
        return found[0]

    def document(self, split: str, number: int) -> np.ndarray:
        """Return a document, with its end-of-document token."""
        reader = self.split(split).reader
        if not 0 <= number < len(reader):
            raise ValueError(f"{self.path}: has {len(reader):,} documents, numbered from 0")
        return reader[number]

    def _probes(self) -> Iterator[bytes]:
        for file in self._files:
            yield f"{file.name} {file.stat().st_size}\n".encode()
        length = self._rows.row_length
        for row in np.linspace(0, self._rows.num_rows - 1, NUM_PROBES, dtype=np.int64).tolist():
            yield self._rows.read(row * length, (row + 1) * length).tobytes()


def _load(file: Path) -> ArrayFile:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: not an array of numpy, or a truncated one ({error}); copy it again") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{file}: contains {array.dtype} and not integers; copy it again")
    if not array.flags.c_contiguous:
        raise ValueError(f"{file}: is in Fortran's order; save it again with numpy.ascontiguousarray")
    return ArrayFile(file, array.dtype, array.shape, array.offset)
