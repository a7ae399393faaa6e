"""EleutherAI's pre-shuffled Pythia data: rows of 2049 tokens, in Pythia's training order.

The folder contains the files of ``EleutherAI/pile-deduped-pythia-preshuffled``
(``document-00000-of-00020.bin`` …, parts of one long file, or that whole file) and a
``tokenizer.json``. Rows are used unchanged and in order.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from .fixed_order import NUM_PROBES, FixedOrderStore
from .manifest import MANIFEST_NAME
from .megatron import read_index_header
from .megatron_order import MegatronOrderStore
from .sequence import TokenSequence
from .store import TokenStore, Verify

ROW_LENGTH = 2049


class PreshuffledStore(FixedOrderStore[TokenSequence]):
    """A folder of pre-shuffled rows. See :class:`FixedOrderStore`.

    The fingerprint covers the tokenizer, the names and sizes of the files, and 64 rows spread over
    each file, because no checksums exist for these 600 GB.

    Raises:
        FileNotFoundError: there is no ``.bin`` file or no ``tokenizer.json``.
        ValueError: the files are not rows of 2049 uint16, or contain ids outside the tokenizer's
            vocabulary.
    """

    contents = "pre-shuffled rows"

    def _open(self) -> TokenSequence:
        paths = sorted(self.path.glob("*.bin"))
        if not paths:
            raise FileNotFoundError(f"{self.path}: neither a {MANIFEST_NAME} nor a .bin file of pre-shuffled rows")
        rows = TokenSequence(paths, np.dtype(np.uint16), vocab_size=self.tokenizer_size, row_length=ROW_LENGTH)
        if len(rows) == 0 or len(rows) % ROW_LENGTH:
            raise ValueError(
                f"{self.path}: {len(rows)} tokens are not a whole number of rows of {ROW_LENGTH}; a .bin file "
                "is missing or damaged, or these are not pre-shuffled rows"
            )
        return rows

    def document(self, split: str, number: int) -> NoReturn:
        """Raise an error: rows do not say where documents begin."""
        raise ValueError(f"{self.path}: pre-shuffled rows have no list of documents; look at samples")

    def _probes(self) -> Iterator[bytes]:
        for path, start, stop in zip(self._rows.paths, self._rows.starts, self._rows.starts[1:], strict=False):
            yield f"{path.name} {stop - start}\n".encode()
            length = min(ROW_LENGTH, int(stop - start))
            for begin in np.linspace(start, stop - length, NUM_PROBES, dtype=np.int64):
                yield self._rows.read(int(begin), int(begin) + length).tobytes()


def open_store(
    path: str | os.PathLike, *, verify: Verify = "auto", on_read: Callable[[int], None] | None = None
) -> TokenStore | PreshuffledStore | MegatronOrderStore:
    """Open a folder of training data: a token store, pre-shuffled rows or an order of Megatron.

    ``verify`` and ``on_read`` are those of a `TokenStore`.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: its files are damaged, or are not what their names say.
    """
    folder = Path(path)
    if not (folder / MANIFEST_NAME).exists():
        if any(folder.glob("*_idx.npy")):
            return MegatronOrderStore(folder)
        files = list(folder.glob("*.bin"))
        if files and not any(map(_has_documents, files)):
            return PreshuffledStore(folder)
    return TokenStore(folder, verify=verify, on_read=on_read)


def _has_documents(file: Path) -> bool:
    """Whether a file has an index of documents. (Pythia's has one of rows, which is not used.)"""
    index = file.with_suffix(".idx")
    try:
        header = read_index_header(index)
    except (FileNotFoundError, ValueError):
        return False
    return header.num_sequences * ROW_LENGTH * header.dtype.itemsize != file.stat().st_size
