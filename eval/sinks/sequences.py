"""Evenly spaced sequences of a text or of the validation split of a token store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..loading import open_store_of
from ..perplexity import read_text_files, text_prefix


@dataclass(frozen=True)
class Sequences:
    """Model inputs ``ids`` ``(N, T)``, each starting with a prefix of ``num_prefix`` ids."""

    ids: Tensor
    num_prefix: int
    source: dict[str, Any]  # the origin of the text, ready for JSON


def sequences_of_texts(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, num_sequences: int, num_tokens: int
) -> Sequences:
    """Cut sequences of ``num_tokens`` tokens, including the tokenizer's prefix, from text files.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the texts are too short.
    """
    tokenized = read_text_files(files, tokenizer)
    text = tokenized.ids[tokenized.num_prefix :]
    num_text = num_tokens - tokenized.num_prefix
    starts = _spread(len(text), num_sequences, num_text, place=", ".join(tokenized.files))
    rows = torch.stack([text[start : start + num_text] for start in starts])
    source = {"files": list(tokenized.files), "sha256": tokenized.sha256, "num_tokens": len(text)}
    return Sequences(_put_in_front(tokenized.ids[: tokenized.num_prefix], rows), tokenized.num_prefix, source)


def sequences_of_store(
    path: Path, tokenizer: PreTrainedTokenizerBase, num_sequences: int, num_tokens: int
) -> Sequences:
    """Cut sequences from the validation split of a token store, or from pre-shuffled rows.

    Document boundaries are ignored, as in training.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store was made with another tokenizer, or has too few tokens.
    """
    store = open_store_of(path, tokenizer)
    split = "train" if store.is_shuffled else "validation"
    stream, prefix = store.split(split), torch.tensor(text_prefix(tokenizer), dtype=torch.long)
    num_text = num_tokens - len(prefix)
    starts = _spread(len(stream), num_sequences, num_text, place=f"the {split} split of {path}")
    rows = torch.stack([torch.from_numpy(stream.read(start, start + num_text)) for start in starts])
    source = {"store": str(path), "split": split, "fingerprint": store.fingerprint, "num_tokens": len(stream)}
    return Sequences(_put_in_front(prefix, rows), len(prefix), source)


def _spread(num_available: int, num_sequences: int, num_tokens: int, place: str) -> range:
    """Return the starts of evenly spaced sequences that do not overlap."""
    if num_tokens < 2:
        raise ValueError("--seq-length leaves no room for two tokens of text: increase it")
    if num_available < num_sequences * num_tokens:
        raise ValueError(
            f"{place} has {num_available} tokens, but {num_sequences} sequences of {num_tokens} are needed: use more "
            "text, or lower --num-sequences or --seq-length"
        )
    stride = num_available // num_sequences
    return range(0, num_sequences * stride, stride)


def _put_in_front(prefix: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(rows), -1), rows], dim=1)
