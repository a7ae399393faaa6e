"""The loss of every token of a long text, with dense, windowed, streaming or recomputed attention.

All functions take a stream ``ids`` ``(T,)`` and return float64 ``(T,)``: entry t is the negative
log-likelihood of token t in nats. Tokens that are not scored are NaN, such as token 0 of a model
without sink tokens, which has no context. If the model itself produces losses that are not finite,
a ValueError is raised.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .. import streaming
from ..models.cache_argument import CACHE
from ..models.checked import refuse_nonfinite_losses
from ..models.config import num_prepended_sinks
from ..streaming.families import num_embedded_positions

CHUNK = 512  # tokens per pass; bounds the memory of logits and a dense mask, does not change the result
GPU_STREAM_CHUNK = 4096  # large enough to use a whole GPU; its logits need 1.6 GB
DENSE_LENGTHS = 8  # dense attention is scored up to this many trained lengths
RECOMPUTE_TOKENS = 16_384  # tokens per pass, over all windows of a batch

ReportTokens = Callable[[int], None]  # called with the number of tokens done since the last call


def streaming_losses(
    model: PreTrainedModel,
    ids: torch.Tensor,
    num_kept: int,
    window: int,
    progress: ReportTokens | None = None,
    memory: streaming.MemoryOptions | None = None,
) -> torch.Tensor:
    """Losses with a cache of ``num_kept`` first and ``window`` recent tokens.

    Token t attends to itself and to at most ``num_kept + window`` tokens in the cache; without kept
    tokens this is window attention. The model's own sink tokens are the first tokens of the stream.
    """
    losses = _unscored(ids)
    losses[0] = _first_loss(model, ids)
    size = GPU_STREAM_CHUNK if model.device.type == "cuda" else CHUNK
    end = 1
    options: dict[str, Any] = {"num_kept": num_kept, "window": window, "chunk_size": size, "memory": memory}
    for chunk in streaming.stream_losses(model, ids[None], **options):
        start, end = end, end + chunk.shape[1]
        losses[start:end] = refuse_nonfinite_losses(chunk[0].to("cpu", torch.float64))
        _advance(progress, end - start)
    return losses


@torch.inference_mode()
def dense_losses(
    model: PreTrainedModel, ids: torch.Tensor, num_prefix: int = 0, progress: ReportTokens | None = None
) -> torch.Tensor:
    """Losses with dense attention, also beyond the trained length.

    The cache grows linearly with the text, and the time quadratically. Scoring stops after
    `DENSE_LENGTHS` trained lengths of text, or when the cache is larger than the free memory; the
    remaining losses are NaN.

    Args:
        num_prefix: number of first tokens of ``ids`` that are no text.
    """
    last = num_dense_inputs(model, len(ids) - 1, DENSE_LENGTHS, num_prefix)
    cache = DynamicCache(config=model.config)
    losses = _unscored(ids)
    losses[0] = _first_loss(model, ids)
    for start in range(0, last, CHUNK):
        end = min(start + CHUNK, last)
        logits = model(_batch(model, ids[start:end]), use_cache=True, **{CACHE: cache}).logits[0]
        losses[start + 1 : end + 1] = _nll(logits, ids[start + 1 : end + 1])
        _advance(progress, end - start)
        if fills_memory(cache, model.device):
            break
    return losses


@torch.inference_mode()
def recompute_losses(
    model: PreTrainedModel,
    ids: torch.Tensor,
    num_keys: int,
    *,
    num_prefix: int = 0,
    every: int = 1,
    progress: ReportTokens | None = None,
) -> torch.Tensor:
    """Losses with a sliding window that is recomputed from the first layer for each token.

    Args:
        num_keys: positions in a window, including the query token, the model's sink tokens and the
            prefix.
        num_prefix: number of first tokens of ``ids`` that every window starts with (a begin-of-text
            token).
        every: after the first ``num_keys`` tokens of the text, score only those whose position in
            the text is a multiple of it.

    Raises:
        ValueError: the window has no room for text.
    """
    num_recent = num_keys - num_prefix - num_prepended_sinks(model.config)
    if num_recent < 1:
        raise ValueError(f"a window of {num_keys} positions leaves no room for text: use a larger cache")
    losses = _unscored(ids)
    head = ids[: num_prefix + num_recent]
    losses[0] = _first_loss(model, ids)
    losses[1 : len(head) + 1] = _nll(model(_batch(model, head)).logits[0], ids[1 : len(head) + 1])
    _advance(progress, min(len(head), len(ids) - 1))

    for targets in torch.arange(len(ids))[len(head) + 1 :].split(max(1, RECOMPUTE_TOKENS // num_keys) * every):
        positions = targets - num_prefix
        chosen = targets[(positions <= num_keys) | (positions % every == 0)]
        if len(chosen):
            recent = ids[chosen[:, None] + torch.arange(-num_recent, 0)]  # (B, num_recent)
            windows = torch.cat([ids[:num_prefix].expand(len(chosen), -1), recent], dim=1)
            logits = model(windows.to(model.device), logits_to_keep=1).logits[:, 0]
            losses[chosen] = _nll(logits, ids[chosen])
        _advance(progress, len(targets))
    return losses


@torch.inference_mode()
def _first_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the loss of the first token, or NaN if the model has no sink tokens."""
    if not num_prepended_sinks(model.config):
        return float("nan")
    first = _batch(model, ids[:1])
    return model(first, labels=first).loss.item()


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses ``(M,)`` of ``targets`` ``(M,)`` under the first M logits of ``(N, V)``."""
    logits = logits[: len(targets)].to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return refuse_nonfinite_losses(losses.to("cpu", torch.float64))


def _batch(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return ids[None].to(model.device)


def _unscored(ids: torch.Tensor) -> torch.Tensor:
    return torch.full((len(ids),), float("nan"), dtype=torch.float64)


def _advance(progress: ReportTokens | None, num_tokens: int) -> None:
    if progress is not None and num_tokens:
        progress(num_tokens)


def num_dense_inputs(model: PreTrainedModel, num_inputs: int, num_lengths: int, num_prefix: int) -> int:
    """Return how many of the first tokens of a stream dense attention reads.

    They are those before the last token of ``num_lengths`` trained lengths of text. So the same
    text is scored whether the model, its tokenizer or neither adds sinks. A model with position
    embeddings ends with these.

    Args:
        num_inputs: number of tokens to read if there is no limit.
        num_prefix: number of first tokens that are no text.
    """
    trained_length = getattr(model.config, "max_position_embeddings", None)
    if trained_length is None:
        return num_inputs
    if num_positions := num_embedded_positions(model.config):
        return min(num_inputs, num_positions - num_prepended_sinks(model.config))
    return min(num_inputs, num_prefix + num_lengths * trained_length - 1)


def fills_memory(cache: DynamicCache, device: torch.device) -> bool:
    """Whether a cache is larger than the memory that is still free."""
    return _num_bytes(cache) > _free_memory(device)


def _num_bytes(cache: DynamicCache) -> int:
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(state.nbytes for state in states if state is not None)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
