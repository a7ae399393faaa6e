"""EleutherAI's pre-shuffled Pythia data: rows of 2049 tokens, in Pythia's training order.

The folder contains the files of ``EleutherAI/pile-deduped-pythia-preshuffled``
(``document-00000-of-00020.bin`` …, parts of one long file, or that whole file) and a
``tokenizer.json``. Rows are used unchanged and in order.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .manifest import MANIFEST_NAME, TOKENIZER_NAME, sha256_of
from .megatron_order import MegatronOrderStore
from .sequence import TokenSequence
from .store import TokenStore, Verify
from .tokenizer import eod_id, load_tokenizer_file, tokenizer_size

ROW_LENGTH = 2049
NUM_PROBES = 64


class PreshuffledStore:
    """A folder of pre-shuffled rows, with the interface of :class:`TokenStore` except the manifest.

    The fingerprint covers the tokenizer, the names and sizes of the files, and 64 rows spread over
    each file, because no checksums exist for these 600 GB.

    Raises:
        FileNotFoundError: there is no ``.bin`` file or no ``tokenizer.json``.
        ValueError: the files are not rows of 2049 uint16, or contain ids outside the tokenizer's
            vocabulary.
    """

    is_shuffled = True

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.tokenizer_path = self.path / TOKENIZER_NAME
        if not self.tokenizer_path.exists():
            raise FileNotFoundError(f"{self.tokenizer_path}: missing; copy Pythia's tokenizer.json there")
        tokenizer = load_tokenizer_file(self.tokenizer_path)
        self.tokenizer_size, self.eod_id = tokenizer_size(tokenizer), eod_id(tokenizer)
        paths = sorted(self.path.glob("*.bin"))
        if not paths:
            raise FileNotFoundError(f"{self.path}: neither a {MANIFEST_NAME} nor a .bin file of pre-shuffled rows")
        self._stream = TokenSequence(paths, np.dtype(np.uint16), vocab_size=self.tokenizer_size, row_length=ROW_LENGTH)
        if len(self._stream) == 0 or len(self._stream) % ROW_LENGTH:
            raise ValueError(
                f"{self.path}: {len(self._stream)} tokens are not a whole number of rows of {ROW_LENGTH}; a .bin file "
                "is missing or damaged, or these are not pre-shuffled rows"
            )
        self.fingerprint = self._probe()

    def split(self, name: str) -> TokenSequence:
        """Return the rows. The only split is "train"."""
        if name != "train":
            raise ValueError(f"{self.path}: pre-shuffled rows have no {name} split; disable validation for them")
        return self._stream

    def documents_of_set(self, split: str, set_name: str) -> TokenSequence:
        """Raise an error: the order of the rows is fixed."""
        raise ValueError(f"{self.path}: pre-shuffled rows have no sets; remove data.weights")

    def document(self, split: str, number: int) -> np.ndarray:
        """Raise an error: rows do not say where documents begin."""
        raise ValueError(f"{self.path}: pre-shuffled rows have no list of documents; look at samples")

    def _probe(self) -> str:
        digest = hashlib.sha256(sha256_of(self.tokenizer_path).encode())
        for path, start, stop in zip(self._stream.paths, self._stream.starts, self._stream.starts[1:], strict=False):
            digest.update(f"{path.name} {stop - start}\n".encode())
            length = min(ROW_LENGTH, int(stop - start))
            for begin in np.linspace(start, stop - length, NUM_PROBES, dtype=np.int64):
                tokens = self._stream.read(int(begin), int(begin) + length)
                digest.update(tokens.tobytes())
        return digest.hexdigest()


def open_store(
    path: str | os.PathLike, *, verify: Verify = "auto", on_read: Callable[[int], None] | None = None
) -> TokenStore | PreshuffledStore | MegatronOrderStore:
    """Open a folder of training data: a token store, pre-shuffled rows or an order of Megatron.

    ``verify`` and ``on_read`` are those of a `TokenStore`.
    """
    folder = Path(path)
    if not (folder / MANIFEST_NAME).exists():
        if any(folder.glob("*_idx.npy")):
            return MegatronOrderStore(folder)
        if any(folder.glob("*.bin")):
            return PreshuffledStore(folder)
    return TokenStore(folder, verify=verify, on_read=on_read)
