"""The rule of windowed layers: which keys each query of a forward pass sees, at which distance.

With S kept tokens and a window W, the query of token t (counted from 0, sink tokens included) sees

- the band: the tokens ``t - W … t``, at their true distances;
- the kept tokens ``i < S`` with ``i < t - W``, at distance ``min(t, S + W) - i``.

These are at most S + W + 1 keys: those that a streaming cache with S kept tokens and a window of W
holds when it reads token t (`sinklm.streaming.rule`). So a model is trained with the attention with
which it streams. An arm's column is one more key of the same softmax, which every query sees.

Keys are stored with the rotary phase of their token. For kept tokens, the rotated query is turned
back by ``max(0, t - S - W)`` positions, which gives the distance above.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .config import SinkGPTNeoXConfig

Rotary = Callable[..., tuple[Tensor, Tensor]]


class WindowRule(NamedTuple):
    """The rule of the layers with one window, for the queries of one forward pass.

    Args:
        window: W; with ``drawn``, the largest value that it can have.
        drawn: the W of this pass, a 0-dimensional integer tensor on the CPU, which may change
            without recompilation; None for ``window``.
        num_kept: S.
        queries: index of each query's token, ``(1 or B, T)``.
        is_token: which keys are tokens and not padding, ``(B, K)``; None if all are.
        cos, sin: rotation by the number of positions by which each query is turned back,
            ``(1 or B, T, rotated dimensions)``; the second half of the table repeats the first.
        is_dense: the queries are those of the last T keys, all of which are tokens.
        num_before: number of tokens in earlier segments.
        num_carried: number of them whose keys are among the keys, after those of the kept tokens.
    """

    window: int
    drawn: Tensor | None
    num_kept: int
    queries: Tensor
    is_token: Tensor | None
    cos: Tensor
    sin: Tensor
    is_dense: bool
    num_before: int | Tensor = 0
    num_carried: int = 0

    @property
    def width(self) -> int | Tensor:
        """The W of this pass."""
        return self.window if self.drawn is None else self.drawn

    def tokens_of_keys(self, num_keys: int) -> Tensor:
        """Return the index of each key's token ``(1 or B, K)``; keys that are no tokens get -1."""
        if self.is_token is None:
            indices = torch.arange(num_keys, device=self.queries.device)[None]
            return torch.where(indices < self.num_kept, indices, indices + self.num_before - self.num_carried)
        missing = num_keys - self.is_token.shape[1]  # the empty slots of a static cache
        is_token = torch.nn.functional.pad(self.is_token, (0, missing))
        return torch.where(is_token, is_token.long().cumsum(-1) - 1, -1)


def check_window(config: SinkGPTNeoXConfig, window: int | Tensor | None) -> None:
    """Check a window that replaces those of a model in one pass.

    Raises:
        ValueError: the model has no windowed layers, or the window is neither an integer between 1
            and its largest one nor a 0-dimensional int64 tensor on the CPU.
    """
    if window is None:
        return
    if not config.has_windows:
        raise ValueError("window was passed to a model without windowed layers: set layer_windows in its configuration")
    if isinstance(window, Tensor):
        if window.ndim or window.dtype != torch.int64 or window.device.type != "cpu":
            raise ValueError(
                f"window is a tensor of shape {tuple(window.shape)}, {window.dtype} on {window.device}: pass a "
                "0-dimensional int64 tensor on the CPU, or an int"
            )
        if torch.compiler.is_compiling():
            return
    elif isinstance(window, bool) or not isinstance(window, int):
        raise ValueError(f"window is {window!r}: pass an int, or a 0-dimensional int64 tensor")
    largest = min(window for window in config.windows if window is not None)
    if not 1 <= window <= largest:
        raise ValueError(f"window is {int(window)}: it must be between 1 and the window of each layer, here {largest}")


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse positions that start again within a row.

    Without a mask, transformers takes them for several texts, which full attention then separates.

    Raises:
        ValueError: they do.
    """
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return
    if (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "windowed layers support one text in each row: position_ids must be consecutive and start at 0 (after the "
            "sinks), or with a cache after its tokens; leave them out"
        )


def rules_of_pass(
    config: SinkGPTNeoXConfig,
    rotary: Rotary,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    window: int | Tensor | None = None,
    num_before: int | Tensor | None = None,
) -> dict[int, WindowRule]:
    """Return the rules of a forward pass by the window of the layers.

    Args:
        rotary: the model's rotary embedding.
        inputs: embeddings ``(B, T, hidden)`` of the pass.
        attention_mask: ``(B, tokens seen + T)``; 0 is padding.
        cache: keys of earlier passes, all of which it must still have.
        window: replaces the windows of all layers.
        num_before: number of tokens in earlier segments. The inputs are then without sinks.

    Raises:
        ValueError: the mask is not two-dimensional, or the cache drops keys.
    """
    num_kept = config.num_sinks if config.num_kept is None else config.num_kept
    num_queries, device = inputs.shape[1], inputs.device
    num_seen = 0 if cache is None else cache.get_seq_length()
    if any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
        raise ValueError("the cache drops keys that windowed layers keep: pass a DynamicCache, or a StreamingCache")
    is_token = None
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: windowed layers require one of shape "
            "(batch, tokens)"
        )
    if attention_mask is not None and not _is_unpadded(attention_mask, num_seen, num_queries):
        is_token = attention_mask.to(device).bool()
        queries = (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, -num_queries:]
    else:
        queries = (torch.arange(num_queries, device=device) + num_seen)[None]
    if num_before is not None:
        queries = queries + config.num_sinks + num_before
    drawn = window if isinstance(window, Tensor) else None
    like = inputs.new_empty(0, dtype=torch.promote_types(inputs.dtype, torch.float32))
    rules = {}
    for largest in {window for window in config.windows if window is not None}:
        width = largest if window is None else window
        # torch.compile needs a compiler for the CPU to add a number and a tensor on the CPU.
        turn = (queries - num_kept - width).clamp(min=0)
        cos, sin = rotary(like, position_ids=turn)
        scaling = getattr(rotary, "attention_scaling", 1.0)  # YaRN's, which the query has already
        rules[largest] = WindowRule(
            window=largest if drawn is not None or window is None else int(window),
            drawn=drawn,
            num_kept=num_kept,
            queries=queries,
            is_token=is_token,
            cos=cos / scaling,
            sin=sin / scaling,
            is_dense=is_token is None and _has_exact_keys(cache),
            num_before=0 if num_before is None else num_before,
        )
    return rules


def _is_unpadded(attention_mask: Tensor, num_seen: int, num_queries: int) -> bool:
    """Whether a mask over several new tokens, such as a prompt, has no padding.

    Of single tokens it is not asked: on a GPU the host would wait in each step.
    """
    if num_queries == 1 or torch.compiler.is_compiling() or attention_mask.shape[1] != num_seen + num_queries:
        return False
    return bool(attention_mask.all())


def _has_exact_keys(cache: Cache | None) -> bool:
    """Whether a layer's keys are those of the tokens so far, without empty slots."""
    if cache is None:
        return True
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
