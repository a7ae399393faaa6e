"""A text of any length through a model: logits or losses piece by piece, in memory that does not grow with it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models.cache_argument import CACHE
from .cache import StreamingCache


def stream_logits(
    model: PreTrainedModel, token_ids: Tensor, *, num_kept: int, window: int, chunk_size: int = 1024
) -> Iterator[Tensor]:
    """Logits ``(B, c, V)`` of consecutive chunks of the streams ``token_ids`` ``(B, T)``.

    The same as token by token, at the speed of a prefill: each chunk is one pass of banded attention.

    Args:
        token_ids: on any device, a memory-mapped tensor too; without the model's own sinks.
        num_kept, window: as in `StreamingCache.for_model`; 0 kept tokens is plain window attention.
        chunk_size: tokens at once; with the cache it bounds the memory.
    """
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, chunk_size=chunk_size)
    for chunk in token_ids.split(chunk_size, dim=1):
        with torch.inference_mode():
            yield model(chunk.to(model.device, torch.long), use_cache=True, **{CACHE: cache}).logits


def stream_losses(
    model: PreTrainedModel, token_ids: Tensor, *, num_kept: int, window: int, chunk_size: int = 1024
) -> Iterator[Tensor]:
    """Negative log-likelihoods in nats, float32 ``(B, c)`` on the model's device, of the tokens 1 … T - 1 in turn.

    Arguments as in `stream_logits`. Token 0 is not scored: without a sink nothing predicts it.
    """
    end = 0
    for logits in stream_logits(model, token_ids, num_kept=num_kept, window=window, chunk_size=chunk_size):
        start, end = end, end + logits.shape[1]
        targets = token_ids[:, start + 1 : end + 1].to(logits.device, torch.long)
        if targets.shape[1]:
            with torch.inference_mode():
                # The vocabulary stays the last dimension: over another one CPU kernels sum it less accurately.
                scores = logits[:, : targets.shape[1]].flatten(0, 1).float()
                yield F.cross_entropy(scores, targets.flatten(), reduction="none").view_as(targets)


def refuse_nan(outputs: Tensor) -> Tensor:
    """What a model gave, logits or losses, as it is.

    Raises:
        ValueError: some of it is NaN.
    """
    if outputs.isnan().any():
        raise ValueError("the model's outputs are not numbers: this checkpoint is damaged, or its training diverged")
    return outputs
