"""Perplexity of the held-out documents of a token store, by set (such as those of the Pile)."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import TokenStore
from ..data.store import Tokens, TokenSource
from ..models.cache_argument import CACHE
from ..models.checked import check_ids, refuse_nonfinite_losses
from ..models.config import num_prepended_sinks
from ..perplexity import perplexity_of
from ..streaming.generation import REPLACEMENT
from .perplexity import text_prefix
from .saved_reports import ALL_SETS
from .tables import number

SPLIT = "validation"
DEFAULT_LENGTH = 2048  # tokens of a window, for a model without a trained length
BATCH_TOKENS = 4096  # per batch of windows
LOGIT_BYTES = 2**30  # per pass, in float32


@dataclass(frozen=True)
class SetLoss:
    """The loss of a set: its sum in nats over ``num_tokens`` tokens of ``num_bytes`` bytes.

    ``is_total`` if it is that of all sets, since a set may have the name ``all`` too.
    """

    name: str
    nats: float
    num_tokens: int
    num_bytes: int
    seconds: float
    is_total: bool = False

    @property
    def loss(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    def as_json(self) -> dict[str, Any]:
        return {
            "set": self.name,
            "is_total": self.is_total,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
        }


def sets_of(store: TokenSource) -> dict[str, Tokens]:
    """Return the held-out tokens of each set of a store, by name.

    Raises:
        ValueError: the store has no sets or no held-out documents, or does not hold them apart.
    """
    if not isinstance(store, TokenStore):
        raise ValueError(f"{store.path} has no sets of documents: use a store of sinklm prepare")
    store.split(SPLIT)  # a ValueError if no document was held out
    names = sorted(name for name, counts in store.manifest.splits[SPLIT].sets.items() if counts.tokens > 1)
    if not names:
        raise ValueError(f"{store.path}: its {SPLIT} split is empty; prepare it with a larger --validation-fraction")
    return {name: store.documents_of_set(SPLIT, name) for name in names}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tokens: Tokens,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SetLoss:
    """Score the documents of a set, one after another, in windows of the trained length.

    Every token but the first is scored once. The windows follow each other without overlap, as
    samples do in training, so a window may begin within a document. The model's sinks, or the
    begin-of-text token of its tokenizer, are in front of each.

    ``num_bytes`` is the UTF-8 length of the scored tokens without special tokens. A character of
    which the first or the last scored token is only a part is not counted.

    Args:
        max_tokens: score only the first tokens of the set.
    """
    started = time.perf_counter()
    num_scored = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
    prefix = torch.tensor(text_prefix(tokenizer), dtype=torch.long)
    room = trained_length(model.config) - len(prefix) - num_prepended_sinks(model.config)
    if room < 1:
        raise ValueError(
            f"the model's trained length of {trained_length(model.config)} tokens leaves no room for text: use a model "
            "with a longer one"
        )
    nats, counter = 0.0, ByteCounter(tokenizer)
    for inputs, targets in _batches(tokens, num_scored, room):
        ids = torch.cat([prefix.expand(len(inputs), -1), inputs], dim=1)
        check_ids(inputs, model)
        nats += _sum_of_losses(model, ids, targets)
        counter.read(targets.flatten())
        if progress:
            progress(targets.numel())
    return SetLoss(name, nats, num_scored, counter.finish(), time.perf_counter() - started)


class ByteCounter:
    """Counts the UTF-8 bytes of token ids that are read piece by piece, a document at a time.

    A piece may end within a character, a document does not. Special tokens are not counted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.num_bytes = tokenizer, 0
        self.special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
        self.document: list[int] = []

    def read(self, ids: torch.Tensor) -> None:
        """Read the next ids ``(N,)``."""
        starts = torch.isin(ids, self.special).nonzero().flatten()
        first, *others = ids.tensor_split(starts)
        self.document += first.tolist()
        for document in others:
            self.num_bytes += len(self._text().encode())
            self.document = document.tolist()

    def finish(self) -> int:
        """Return the number of bytes of all documents."""
        return self.num_bytes + len(self._text().rstrip(REPLACEMENT).encode())

    def _text(self) -> str:
        text = self.tokenizer.decode(self.document, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if self.num_bytes else text.lstrip(REPLACEMENT)


def trained_length(config: PreTrainedConfig) -> int:
    """Return the trained length, `DEFAULT_LENGTH` if the config has none (ALiBi: MPT, BLOOM)."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next(filter(None, (getattr(config, name, None) for name in names)), DEFAULT_LENGTH)


@torch.inference_mode()
def _sum_of_losses(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the loss of ``targets`` ``(B, T)`` after ids ``(B, P + T)``, summed in nats.

    A long window is read in several passes through a cache, since a model may scale its logits or
    limit them, so that only the model itself can compute them.
    """
    num_prefix = ids.shape[1] - targets.shape[1]
    targets = F.pad(targets, (num_prefix, 0), value=-100)  # which have no loss
    size = max(1, LOGIT_BYTES // (4 * len(ids) * model.get_input_embeddings().weight.shape[0]))
    options: dict[str, Any] = {"use_cache": False}
    if ids.shape[1] > size:
        options = {"use_cache": True, CACHE: DynamicCache(config=model.config)}
    nats = 0.0
    for piece, wanted in zip(ids.split(size, dim=1), targets.split(size, dim=1), strict=True):
        logits = model(piece.to(model.device), **options).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.to(logits.device).flatten(), reduction="none")
        nats += float(refuse_nonfinite_losses(losses).double().sum())
    return nats


def _batches(tokens: Tokens, num_scored: int, room: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield consecutive inputs and targets ``(B, T)``; the last window may be shorter."""
    num_whole, size = num_scored // room, max(1, BATCH_TOKENS // room)
    for first in range(0, num_whole, size):
        last = min(first + size, num_whole)
        piece = _read(tokens, first * room, last * room + 1)
        yield piece[:-1].view(-1, room), piece[1:].view(-1, room)
    if num_whole * room < num_scored:
        piece = _read(tokens, num_whole * room, num_scored + 1)
        yield piece[None, :-1], piece[None, 1:]


def _read(tokens: Tokens, start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(tokens.read(start, stop)).long()


def total(sets: Sequence[SetLoss]) -> SetLoss:
    """Return the loss over all tokens of several sets, named ``all``."""
    sums = [[s.nats, s.num_tokens, s.num_bytes, s.seconds] for s in sets]
    nats, num_tokens, num_bytes, seconds = (sum(column) for column in zip(*sums, strict=True))
    return SetLoss("all", nats, int(num_tokens), int(num_bytes), seconds, is_total=True)


def results_table(sets: Sequence[SetLoss], title: str) -> Table:
    table = Table(title=title)
    table.add_column("Set")
    for header in ("Perplexity", "Nats", "Bits/byte", "Tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in [*sets, *([total(sets)] if len(sets) > 1 else [])]:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        name = ALL_SETS if row.is_total else row.name
        table.add_row(name, number(row.perplexity, 2), f"{row.loss:.4f}", bits, f"{row.num_tokens:,}")
    return table
