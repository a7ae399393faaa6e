"""Softmax over kept keys and a band of recent ones.

A query sees the kept keys at one phase and the band at another. `two_phase_attention` does it with a mask, on any
device; `flash_two_phase_attention` computes only the band, with FlashAttention, and merges the kept keys into it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .sink_column import SinkColumn, explicit_attention, merge_column


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    column: SinkColumn | None = None,
) -> Tensor:
    """Grouped-query attention ``(B, H, T, D)``; ``key`` and ``value`` ``(B, G, K, D)`` may have fewer heads.

    ``mask`` is boolean (True is visible) or added, and broadcasts to ``(B, H, T, K)``; nothing hides a sink's column.
    """
    if column is not None:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        return explicit_attention(query, key, value, mask, column, scaling)[0]
    (batch_size, num_heads, num_queries, _), num_groups = query.shape, key.shape[1]
    if num_queries == 1 and num_heads > num_groups:  # heads of a group take the place of queries: nothing is repeated
        query = query.reshape(batch_size, num_groups, num_heads // num_groups, -1)
        if mask is not None and mask.shape[1] == num_heads:
            mask = mask.reshape(mask.shape[0], num_groups, num_heads // num_groups, -1)
    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # the fused kernels want one head size
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out[..., :value_dim].reshape(batch_size, num_heads, num_queries, value_dim)


def two_phase_attention(
    query: Tensor,
    turned_query: Tensor,
    kept_key: Tensor,
    band_key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    rotary_dim: int,
    column: SinkColumn | None = None,
) -> Tensor:
    """One softmax over kept keys, which see ``turned_query``, and band keys, which see ``query``.

    The two phases of a query stand side by side, and each key has zeros where the other kind reads: the scores of both
    kinds come out of one product of ``D + rotary_dim`` dimensions, and nothing has to be merged.
    """
    zeros_kept = kept_key.new_zeros(*kept_key.shape[:-1], rotary_dim)
    zeros_band = band_key.new_zeros(*band_key.shape[:-1], rotary_dim)
    both_phases = torch.cat((turned_query[..., :rotary_dim], query), dim=-1)
    kept = torch.cat((kept_key[..., :rotary_dim], zeros_kept, kept_key[..., rotary_dim:]), dim=-1)
    band = torch.cat((zeros_band, band_key), dim=-1)
    return attention(both_phases, torch.cat((kept, band), dim=2), value, mask, scaling, column)


def can_flash(query: Tensor) -> bool:
    """FlashAttention takes half precision and heads of 8, 16 … 256 dimensions, on CUDA from compute capability 8.0."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] in range(8, 257, 8)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def flash_two_phase_attention(
    query: Tensor,
    turned_query: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kept_visible: Tensor,
    band_key: Tensor,
    band_value: Tensor,
    window: int,
    scaling: float,
    column: SinkColumn | None = None,
) -> Tensor:
    """The same for rows of equal length: query i of T ``(B, H, T, D)`` sees keys ``[n + i - window, n + i]`` of the
    n + T band keys ``(B, G, n + T, D)``, and the S kept keys where ``kept_visible`` ``(T, S)``.
    """
    out, lse = flash_band(query, band_key, band_value, window, scaling)
    if column is not None:
        out, lse = merge_column(out, lse, column)
    if not kept_key.shape[2]:
        return out
    num_heads = query.shape[1]
    kept_key, kept_value = repeat_heads(kept_key, num_heads), repeat_heads(kept_value, num_heads)
    scores = turned_query.float() @ kept_key.float().mT * scaling  # unscaled they need more than float16 can hold
    return merge_kept(out, lse, scores.masked_fill(~kept_visible, float("-inf")), kept_value)


def flash_band(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Sliding-window attention ``(B, H, T, D)`` and the log-sum-exp of its scores ``(B, H, T)``, by FlashAttention."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    batch_size, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    query, key, value = (
        repeat_heads(states, num_heads).transpose(1, 2).flatten(0, 1) for states in (query, key, value)
    )
    rows = torch.arange(batch_size + 1, device=query.device, dtype=torch.int32)
    out, lse = varlen_attn(
        query,
        key,
        value,
        rows * num_queries,
        rows * num_keys,
        num_queries,
        num_keys,
        window_size=(window, 0),
        scale=scaling,
        return_aux=AuxRequest(lse=True),
    )
    out = out.unflatten(0, (batch_size, num_queries)).transpose(1, 2)
    return out, lse.unflatten(1, (batch_size, num_queries)).transpose(0, 1)


def merge_kept(band_out: Tensor, band_lse: Tensor, scores: Tensor, kept_value: Tensor) -> Tensor:
    """Widen a softmax by more keys: their scores ``(B, H, T, S)`` and values ``(B, H, S, D)``.

    ``band_out`` ``(B, H, T, D)`` and ``band_lse`` ``(B, H, T)`` are the result so far and its log-sum-exp.
    """
    total = torch.logaddexp(band_lse, scores.logsumexp(-1))[..., None]
    kept = (scores - total).exp().to(kept_value.dtype) @ kept_value
    return (band_out * (band_lse[..., None] - total).exp()).to(kept.dtype) + kept


def repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Repeat the G heads of keys or values ``(B, G, K, D)`` for H query heads."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)
