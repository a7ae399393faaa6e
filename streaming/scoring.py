"""Logits and losses of texts of any length, in chunks and constant memory."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models.cache_argument import CACHE
from ..models.checked import check_ids
from .cache import StreamingCache
from .memory import MemoryOptions
from .wrappers import unwrapped


def stream_logits(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    num_kept: int,
    window: int,
    chunk_size: int = 1024,
    kv_dtype: Literal["int8", "int4"] | None = None,
    memory: MemoryOptions | None = None,
) -> Iterator[Tensor]:
    """Yield logits ``(B, c, V)`` of consecutive chunks of the streams ``token_ids`` ``(B, T)``.

    Each chunk is one pass of banded attention. The result equals streaming token by token, at the
    speed of a prefill.

    Args:
        token_ids: on any device or memory-mapped, without the model's own sinks.
        num_kept: as in `StreamingCache.for_model`; 0 is window attention.
        window: as in `StreamingCache.for_model`.
        chunk_size: tokens per pass; memory depends on it and on the size of the cache.
        kv_dtype: as in `StreamingCache.for_model`. Tokens of one pass see each other in full
            precision, in addition to the last 32 before it. Only ``chunk_size=1`` thus gives
            exactly the losses of decoding.
        memory: as in `StreamingCache.for_model`.

    Raises:
        ValueError: ``token_ids`` is no tensor ``(B, T)`` of integers, is empty, or has ids that the
            model does not have; or as `StreamingCache.for_model`.
    """
    if not isinstance(token_ids, Tensor) or token_ids.ndim != 2:
        given = (
            f"of shape {tuple(token_ids.shape)}" if isinstance(token_ids, Tensor) else f"a {type(token_ids).__name__}"
        )
        raise ValueError(f"token_ids is {given}: pass a tensor of shape (streams, tokens)")
    if token_ids.is_floating_point() or token_ids.is_complex() or not token_ids.shape[1]:
        raise ValueError(
            f"token_ids has {token_ids.shape[1]} values of {token_ids.dtype}: pass at least one integer id"
        )
    cache = StreamingCache.for_model(
        model, num_kept=num_kept, window=window, chunk_size=chunk_size, kv_dtype=kv_dtype, memory=memory
    )
    device = unwrapped(model).device
    check_ids(token_ids, unwrapped(model))  # at once: a check of each chunk would wait for a GPU
    for chunk in token_ids.split(chunk_size, dim=1):
        with torch.inference_mode():
            yield model(chunk.to(device, torch.long), use_cache=True, **{CACHE: cache}).logits


def stream_losses(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    num_kept: int,
    window: int,
    chunk_size: int = 1024,
    kv_dtype: Literal["int8", "int4"] | None = None,
    memory: MemoryOptions | None = None,
) -> Iterator[Tensor]:
    """Yield negative log-likelihoods of the tokens 1 … T - 1 in nats, chunk by chunk.

    Each chunk is float32 ``(B, c)`` on the model's device. Arguments are those of `stream_logits`.
    Token 0 is not scored, because without a sink it has no context, so at least two are required.
    """
    end = 0
    chunks = stream_logits(
        model,
        token_ids,
        num_kept=num_kept,
        window=window,
        chunk_size=chunk_size,
        kv_dtype=kv_dtype,
        memory=memory,
    )
    for logits in chunks:
        start, end = end, end + logits.shape[1]
        targets = token_ids[:, start + 1 : end + 1].to(logits.device, torch.long)
        if targets.shape[1]:
            with torch.inference_mode():
                # Keep the vocabulary in the last dimension: CPU kernels sum others less accurately.
                scores = logits[:, : targets.shape[1]].flatten(0, 1).float()
                yield F.cross_entropy(scores, targets.flatten(), reduction="none").view_as(targets)
        elif end == 1:
            raise ValueError("token_ids has one token: pass at least two, because the first one is not scored")
