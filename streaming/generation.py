"""Text generation without a length limit, in constant memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.checked import check_ids, refuse_nonfinite_logits
from ..models.config import default_num_kept, sink_config
from .cache import StreamingCache
from .decoding import StreamingDecoder
from .families import is_one_graph
from .layers import former_shape
from .sampling import Sampling
from .wrappers import decoder_of, unwrapped

DEFAULT_CACHE_SIZE = 1024
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 16  # after so many tokens without a complete character, the text is shown as it is


def default_cache(model: PreTrainedModel, block_size: int = 0) -> tuple[int, int]:
    """Return ``(num_kept, window)`` for a model.

    ``num_kept`` is the number of sink tokens, or 4 without any. The cache has 1024 tokens, or for a
    model that was trained on shorter texts, one less than its training length, and less by a block.
    No distance in the cache or to a block is then longer than those seen in training. An export
    with full attention whose layers were all trained with one window has that window and its kept
    tokens.

    Args:
        block_size: tokens of a block of the cache's memory, 0 without one.
    """
    config = decoder_of(model).config
    if former := former_shape(config):
        return former.num_kept, former.window
    num_kept = default_num_kept(config)
    trained_length = getattr(config, "max_position_embeddings", None) or DEFAULT_CACHE_SIZE + 1
    return num_kept, max(1, min(DEFAULT_CACHE_SIZE, trained_length - 1 - max(0, block_size - num_kept)) - num_kept)


def is_list_of_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt)


class Generator:
    """Generates continuations of prompts in one streaming cache.

    The step is compiled on CUDA only: on a CPU, compiling takes longer than generating a few
    hundred tokens and hardly improves the speed.

    Args:
        sampling: settings of `Sampling`, such as ``temperature=0.8, top_p=0.9``. By default the
            most likely token is always chosen. ``repetition_penalty`` applies to the last tokens,
            as many as the cache holds.
        compile: set to False for short texts, which finish before the step is compiled.

    Raises:
        TypeError: ``cache`` is no `StreamingCache`.
        ValueError: a setting of the sampling is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StreamingCache,
        *,
        compile: bool = True,
        **sampling: Any,
    ):
        if not isinstance(cache, StreamingCache):
            raise TypeError(f"cache is {cache!r}: pass StreamingCache.for_model(model, num_kept=…, window=…)")
        self.cache, self.device = cache, unwrapped(model).device
        self.sampling = Sampling(**sampling)
        self.processors = self.sampling.processors()
        self.recent: deque[int] = deque(maxlen=cache.shape.num_cached)  # the last tokens of the text
        self.turn = 0  # number of prompts read
        self.unread: list[int] = []  # the last generated token, until it is in the cache
        sink_ids = sink_config(unwrapped(model).config).sink_token_ids  # never generated
        self.sink_ids = torch.tensor(sink_ids, dtype=torch.long, device=self.device)
        self.decoder = StreamingDecoder(model, cache)
        is_one_step = is_one_graph(cache.decoder) and not self.decoder.is_dispatched
        self.is_compiled = compile and self.device.type == "cuda" and is_one_step
        self.read_one = self.decoder if self.is_compiled else self.decoder.prefill

    def __call__(self, prompt_ids: list[int]) -> Iterator[int]:
        """Read a prompt of at least one token and yield tokens indefinitely.

        The model reads a token only when the next one is requested, so the last token that was
        yielded is not in the cache yet. The next call reads it before its own prompt, which
        continues the text; set `unread` to ``[]`` to leave it out. After that call, this iterator
        raises an error, because both texts would share one cache.

        Raises:
            TypeError: the prompt is no list of integers.
            ValueError: the prompt is empty or has ids that the model does not have, the logits are
                not finite, or another prompt was read since.
        """
        if not is_list_of_ids(prompt_ids):
            raise TypeError(
                f"the prompt is of type {type(prompt_ids).__name__}, not a list of token ids: pass "
                "tokenizer(text)['input_ids']"
            )
        if not prompt_ids:
            raise ValueError("the prompt is empty: pass at least one token")
        self.turn = turn = self.turn + 1
        if not self.cache.is_initialized:  # also after `cache.reset()`
            self.unread = []
            self.recent.clear()
        prompt = torch.tensor([[*self.unread, *prompt_ids]])
        check_ids(prompt, unwrapped(self.decoder.model))
        logits = self.decoder.prefill(prompt.to(self.device))
        self.unread = []
        self.recent.extend(prompt_ids)
        while True:
            token = self.sample(logits[:, -1])
            self.unread = [int(token)]
            self.recent.append(self.unread[0])
            yield self.unread[0]
            if self.turn != turn:
                raise ValueError(
                    "this Generator has read another prompt since: use only its newest iterator, or create a Generator "
                    "with its own cache for each text"
                )
            logits = self.read_one(token)
            self.unread = []

    def sample(self, logits: Tensor) -> Tensor:
        """Sample the next tokens ``(B, 1)`` from logits ``(B, V)``; sinks are never sampled."""
        scores = refuse_nonfinite_logits(logits).float().index_fill(-1, self.sink_ids, float("-inf"))
        recent = [list(self.recent)] if self.sampling.repetition_penalty != 1 else []
        scores = self.processors(torch.tensor(recent, dtype=torch.long, device=scores.device), scores)
        return scores.argmax(-1, keepdim=True) if self.sampling.is_greedy else torch.multinomial(scores.softmax(-1), 1)

    def reset(self) -> None:
        """Empty the cache for a new text."""
        self.cache.reset()
        self.unread = []
        self.recent.clear()


class TextStream:
    """Decodes a stream of token ids into complete characters, with only a few tokens of context.

    A token can be part of a character, and its text can depend on the token before it (a space).
    Each token is therefore decoded together with the tokens of the last piece. An incomplete
    character, which decodes to U+FFFD, is held back until it is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # tokens of the last complete piece, then the new tokens
        self.num_context = 0  # number of tokens of the last piece
        self.num_shown = 0  # number of characters of the decoded ids that were returned

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it completes, empty if a character is incomplete."""
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
        """Return the rest of the text at its end, including an incomplete character."""
        rest = self._decode()[self.num_shown :]
        self.ids, self.num_context, self.num_shown = [], 0, 0
        return rest

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
