"""EleutherAI's pre-shuffled Pythia data: rows of 2049 tokens, in the order in which Pythia was trained on them.

The folder of ``EleutherAI/pile-deduped-pythia-preshuffled`` (``document-00000-of-00020.bin`` …, which are parts of one
long file, or that file) with a ``tokenizer.json`` put beside them. The rows are used as they are, in their order.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from .manifest import MANIFEST_NAME, TOKENIZER_NAME, sha256_of
from .store import TokenSequence, TokenStore, Verify
from .tokenizer import eod_id, load_tokenizer_file, tokenizer_size

ROW_LENGTH = 2049
NUM_PROBES = 64


class PreshuffledStore:
    """A folder of pre-shuffled rows, with what :class:`TokenStore` has but a manifest.

    The fingerprint covers the tokenizer, names and sizes of the files, and 64 rows spread over each of them: there are
    no checksums to hold 600 GB against.

    Raises:
        FileNotFoundError: no ``.bin`` file or no ``tokenizer.json``.
        ValueError: the files are not rows of 2049 uint16, or have ids which the tokenizer has not.
    """

    is_shuffled = True

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.tokenizer_path = self.path / TOKENIZER_NAME
        if not self.tokenizer_path.exists():
            raise FileNotFoundError(f"{self.tokenizer_path}: missing; put the tokenizer of the rows there (Pythia's)")
        tokenizer = load_tokenizer_file(self.tokenizer_path)
        self.tokenizer_size, self.eod_id = tokenizer_size(tokenizer), eod_id(tokenizer)
        paths = sorted(self.path.glob("*.bin"))
        if not paths:
            raise FileNotFoundError(f"{self.path}: neither a {MANIFEST_NAME} nor a .bin file of pre-shuffled rows")
        self._stream = TokenSequence(paths, np.dtype(np.uint16), row_length=ROW_LENGTH)
        if len(self._stream) == 0 or len(self._stream) % ROW_LENGTH:
            raise ValueError(
                f"{self.path}: {len(self._stream)} tokens are no whole rows of {ROW_LENGTH}; a part of the .bin files "
                "is missing, or they are of another kind"
            )
        self.fingerprint = self._probe()

    def split(self, name: str) -> TokenSequence:
        """The rows; there is no other split than "train"."""
        if name != "train":
            raise ValueError(f"{self.path}: pre-shuffled rows have no {name} split; turn validation off for them")
        return self._stream

    def _probe(self) -> str:
        digest = hashlib.sha256(sha256_of(self.tokenizer_path).encode())
        for path, start, stop in zip(self._stream.paths, self._stream.starts, self._stream.starts[1:], strict=False):
            digest.update(f"{path.name} {stop - start}\n".encode())
            length = min(ROW_LENGTH, int(stop - start))
            for begin in np.linspace(start, stop - length, NUM_PROBES, dtype=np.int64):
                tokens = self._stream.read(int(begin), int(begin) + length)
                if tokens.max() >= self.tokenizer_size:
                    raise ValueError(f"{path}: id {tokens.max()} is beyond the {self.tokenizer_size} of the tokenizer")
                digest.update(tokens.tobytes())
        return digest.hexdigest()


def open_store(path: str | os.PathLike, *, verify: Verify = "auto") -> TokenStore | PreshuffledStore:
    """The training data in a folder, of whichever of the two kinds it is."""
    folder = Path(path)
    if not (folder / MANIFEST_NAME).exists() and any(folder.glob("*.bin")):
        return PreshuffledStore(folder)
    return TokenStore(folder, verify=verify)
