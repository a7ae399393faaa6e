"""Sequences of equal length, spread evenly over a text or over the held-out split of a token store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...data import open_store
from ..perplexity import read_text_files, text_prefix


@dataclass(frozen=True)
class Sequences:
    """What a model is given: ``ids`` ``(N, T)``, the first ``num_prefix`` of each being the tokenizer's own."""

    ids: Tensor
    num_prefix: int
    source: dict[str, Any]  # where the text is from, ready for JSON


def sequences_of_texts(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, num_sequences: int, num_tokens: int
) -> Sequences:
    """Cut sequences of ``num_tokens`` tokens, those included that the tokenizer puts in front, from text files.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: if the texts are too short.
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
    """The same from a token store: its held-out documents, or its rows if it is pre-shuffled.

    Document borders are ignored, as in training.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if the store was made with another tokenizer, or holds too few tokens.
    """
    store = open_store(path, verify="size")
    ids = Tokenizer.from_file(str(store.tokenizer_path)).get_vocab()
    known = tokenizer.get_vocab()
    if any(known.get(token) != i for token, i in ids.items()):
        raise ValueError(f"{path} was made with another tokenizer than the model's: give --text instead")
    split = "train" if store.is_shuffled else "validation"
    stream, prefix = store.split(split), torch.tensor(text_prefix(tokenizer), dtype=torch.long)
    num_text = num_tokens - len(prefix)
    starts = _spread(len(stream), num_sequences, num_text, place=f"the {split} split of {path}")
    rows = torch.stack([torch.from_numpy(stream.read(start, start + num_text)) for start in starts])
    source = {"store": str(path), "split": split, "fingerprint": store.fingerprint, "num_tokens": len(stream)}
    return Sequences(_put_in_front(prefix, rows), len(prefix), source)


def _spread(num_available: int, num_sequences: int, num_tokens: int, place: str) -> range:
    """Where sequences begin that lie evenly over a text and do not overlap."""
    if num_tokens < 2:
        raise ValueError("--seq-length leaves no room for two tokens of text: raise it")
    if num_available < num_sequences * num_tokens:
        raise ValueError(
            f"{place} holds {num_available} tokens where {num_sequences} sequences of {num_tokens} are wanted: give "
            "more text, or lower --num-sequences or --seq-length"
        )
    stride = num_available // num_sequences
    return range(0, num_sequences * stride, stride)


def _put_in_front(prefix: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(rows), -1), rows], dim=1)
