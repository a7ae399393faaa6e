"""Writing without end: sample a token, show its text, read it, and so on, in memory that does not grow."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import StreamingCache
from .decoding import StreamingDecoder
from .scoring import refuse_nan

DEFAULT_CACHE_SIZE = 1024
DEFAULT_NUM_KEPT = 4  # of a model without a sink of its own (Xiao et al. 2024, Table 2)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MIN_TEMPERATURE = 1e-6  # takes the likeliest token; scores over a smaller one overflow
MAX_PENDING = 16  # tokens without a whole character, after which what there is counts as whole


def default_cache(model: PreTrainedModel) -> tuple[int, int]:
    """``(num_kept, window)`` for a model: 4+1020, or its sinks and what is left of 1024.

    A model trained on shorter texts gets a cache in which no distance is longer than those it was trained on.
    """
    num_kept = getattr(model.config, "num_sinks", 0) or DEFAULT_NUM_KEPT
    trained_length = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CACHE_SIZE + 1
    return num_kept, max(1, min(DEFAULT_CACHE_SIZE, trained_length - 1) - num_kept)


class Generator:
    """Reads prompts into one streaming cache and writes their continuations into it.

    The step is compiled on CUDA only: on a CPU compiling takes longer than a few hundred tokens, and gains little.

    Args:
        compile: False for short texts, which are done before a step is compiled.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among so many of the likeliest tokens; None among all.

    Raises:
        ValueError: a temperature below 0 or without end, or ``top_k < 1``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StreamingCache,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        compile: bool = True,
    ):
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: it must be 0 or a positive number")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: it must be at least 1, or None to sample among all tokens")
        self.cache, self.device = cache, model.device
        self.temperature, self.top_k = temperature, top_k
        self.turn = 0  # counts the prompts read
        self.unread: list[int] = []  # the last token written, until it has entered the cache
        self.sink_ids = torch.tensor(getattr(model.config, "sink_token_ids", []), dtype=torch.long, device=model.device)
        self.decoder = StreamingDecoder(model, cache)
        self.is_compiled = compile and self.device.type == "cuda"
        self.read_one = self.decoder if self.is_compiled else self.decoder.prefill

    def __call__(self, prompt_ids: list[int]) -> Iterator[int]:
        """Read a prompt of at least one token, and write tokens without end.

        A token is read when the next one is asked for: the last one taken from the iterator has not entered the cache.
        The next prompt ends this iterator: there is one cache, and their texts would mix.

        Raises:
            ValueError: the prompt is empty, another one was read since, or its logits are NaN.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty: give at least one token")
        self.turn = turn = self.turn + 1
        logits = refuse_nan(self.decoder.prefill(torch.tensor([prompt_ids], device=self.device)))
        self.unread = []
        while True:
            token = self.sample(logits[:, -1])
            self.unread = [int(token)]
            yield self.unread[0]
            if self.turn != turn:
                raise ValueError(
                    "this Generator has read another prompt since: take tokens from its newest iterator only, or make "
                    "a Generator with a cache of its own for each text"
                )
            logits = self.read_one(token)
            self.unread = []

    def sample(self, logits: Tensor) -> Tensor:
        """Choose the next token ``(B, 1)`` by its logits ``(B, V)``; never a sink."""
        scores = logits.float().index_fill(-1, self.sink_ids, float("-inf"))
        if self.temperature == 0:
            return scores.argmax(-1, keepdim=True)
        scores = scores / max(self.temperature, MIN_TEMPERATURE)
        if self.top_k is None or self.top_k >= scores.shape[-1]:
            return torch.multinomial(scores.softmax(-1), 1)
        best, ids = scores.topk(self.top_k, dim=-1)
        return ids.gather(-1, torch.multinomial(best.softmax(-1), 1))


class TextStream:
    """Turns token ids into text as they come, each character once and whole, looking at a few last tokens only.

    One token can be a part of a character, and what a tokenizer makes of a token can depend on the one before (a
    space). So a token is decoded together with those of the last piece shown, and an unfinished character, which
    decodes to U+FFFD, waits for its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # those of the last whole piece, then the new ones
        self.num_context = 0  # how many are of the last piece
        self.num_shown = 0  # characters of the decoded ids

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty if it leaves a character unfinished."""
        self.ids.append(token_id)
        text = self._decode()
        is_overdue = len(self.ids) - self.num_context >= MAX_PENDING
        whole = text if is_overdue else text.rstrip(REPLACEMENT)
        piece = whole[self.num_shown :]
        self.num_shown = max(self.num_shown, len(whole))
        if is_overdue or (piece and whole == text):
            self.ids = self.ids[self.num_context :]
            self.num_context, self.num_shown = len(self.ids), len(self._decode())
        return piece

    def flush(self) -> str:
        """What is left at the end of the text, an unfinished character included."""
        rest = self._decode()[self.num_shown :]
        self.ids, self.num_context, self.num_shown = [], 0, 0
        return rest

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
