"""What folders of samples in a fixed order have in common: a tokenizer, one split and no sets."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import numpy as np

from .manifest import TOKENIZER_NAME, sha256_of
from .tokenizer import eod_id, load_tokenizer_file, tokenizer_size

NUM_PROBES = 64

Rows = TypeVar("Rows")


class FixedOrderStore(ABC, Generic[Rows]):
    """A folder without a manifest, whose samples are used as they are and in their order.

    It has the interface of :class:`TokenStore` except the manifest. The only split is "train".

    Attributes:
        contents: what the folder contains, for messages.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
    """

    is_shuffled = True
    contents: str

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.tokenizer_path = self.path / TOKENIZER_NAME
        if not self.tokenizer_path.exists():
            raise FileNotFoundError(f"{self.tokenizer_path}: missing; copy Pythia's tokenizer.json there")
        tokenizer = load_tokenizer_file(self.tokenizer_path)
        self.tokenizer_size, self.eod_id = tokenizer_size(tokenizer), eod_id(tokenizer)
        self._rows = self._open()
        digest = hashlib.sha256(sha256_of(self.tokenizer_path).encode())
        for probe in self._probes():
            digest.update(probe)
        self.fingerprint = digest.hexdigest()

    @abstractmethod
    def _open(self) -> Rows:
        """Open the samples."""

    @abstractmethod
    def _probes(self) -> Iterator[bytes]:
        """What the fingerprint covers besides the tokenizer: names, sizes and some samples."""

    def split(self, name: str) -> Rows:
        """Return the samples. The only split is "train"."""
        if name != "train":
            raise ValueError(f"{self.path}: contains {self.contents} and no {name} split; disable validation for it")
        return self._rows

    def documents_of_set(self, split: str, set_name: str) -> NoReturn:
        """Raise an error: the order is fixed."""
        raise ValueError(f"{self.path}: contains {self.contents} and no sets; remove data.weights")

    @abstractmethod
    def document(self, split: str, number: int) -> np.ndarray:
        """Return document ``number`` with its end-of-document token, if documents can be found."""
