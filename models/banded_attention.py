"""Attention over kept keys and a band of recent keys.

A query has one rotary phase for the kept keys and another for the band. `two_phase_attention` uses
a mask and runs on any device. `flash_two_phase_attention` computes only the band, with
FlashAttention, and then merges the kept keys.
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
    softcap: float | None = None,
) -> Tensor:
    """Compute grouped-query attention.

    Args:
        query: ``(B, H, T, D)``.
        key, value: ``(B, G, K, D)``; G divides H.
        mask: boolean (True is visible) or additive, broadcasts to ``(B, H, T, K)``. It does not
            apply to the sink's column, which every query sees.
        scaling: factor of the scores.
        softcap: limit of the scores, ``softcap * tanh(score / softcap)``; None for no limit.

    Returns:
        ``(B, H, T, D)``.
    """
    if softcap is not None:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        return capped_attention(query, key, value, mask, scaling, column, softcap)
    if column is not None:
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        return explicit_attention(query, key, value, mask, column, scaling)[0]
    (batch_size, num_heads, num_queries, _), num_groups = query.shape, key.shape[1]
    if num_queries == 1 and num_heads > num_groups:  # use the heads of a group as queries: no keys are repeated
        query = query.reshape(batch_size, num_groups, num_heads // num_groups, -1)
        if mask is not None and mask.shape[1] == num_heads:
            mask = mask.reshape(mask.shape[0], num_groups, num_heads // num_groups, -1)
    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # the fused kernels require one head size
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out[..., :value_dim].reshape(batch_size, num_heads, num_queries, value_dim)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    column: SinkColumn | None,
    softcap: float,
) -> Tensor:
    """Compute attention with limited scores (Gemma 2) by an explicit softmax, as `attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = softcap * (query.to(dtype) @ key.mT.to(dtype) * (scaling / softcap)).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out, lse = scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)
    return out if column is None else merge_column(out, lse, column)[0]


def two_phase_attention(
    query: Tensor,
    turned_query: Tensor,
    kept_key: Tensor,
    band_key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    rotary: slice,
    column: SinkColumn | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute one softmax over kept keys (scored with ``turned_query``) and band keys (``query``).

    No merge is needed, see `two_phase_states`.
    """
    queries, keys = two_phase_states(query, turned_query, kept_key, band_key, rotary)
    return attention(queries, keys, value, mask, scaling, column, softcap)


def two_phase_states(
    query: Tensor, turned_query: Tensor, kept_key: Tensor, band_key: Tensor, rotary: slice
) -> tuple[Tensor, Tensor]:
    """Return queries and keys whose product is the scores of kept keys and of band keys.

    Queries are concatenations of both phases, and each key is zero in the dimensions of the phase
    that does not apply to it. One product of D dimensions and the ``rotary`` ones again thus
    computes the scores of both kinds.
    """
    before, rotated, after = kept_key[..., : rotary.start], kept_key[..., rotary], kept_key[..., rotary.stop :]
    zeros_band = band_key.new_zeros(*band_key.shape[:-1], rotated.shape[-1])
    both_phases = torch.cat((turned_query[..., rotary], query), dim=-1)
    kept = torch.cat((rotated, before, torch.zeros_like(rotated), after), dim=-1)
    band = torch.cat((zeros_band, band_key), dim=-1)
    return both_phases, torch.cat((kept, band), dim=2)


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
    """Like `two_phase_attention`, with FlashAttention, for rows of equal length.

    Query i of ``query`` ``(B, H, T, D)`` attends to the keys ``[n + i - window, n + i]`` of the
    n + T band keys ``(B, G, n + T, D)``, and to those of the S kept keys ``(B, G, S, D)`` for which
    ``kept_visible`` ``(T, S)`` is True.
    """
    value_dim, num_missing = band_value.shape[-1], query.shape[-1] - band_value.shape[-1]
    if num_missing:  # FlashAttention requires one head size
        kept_value, band_value = F.pad(kept_value, (0, num_missing)), F.pad(band_value, (0, num_missing))
    out, lse = flash_band(query, band_key, band_value, window, scaling)
    if column is not None:
        if num_missing and column.value is not None:
            column = column._replace(value=F.pad(column.value, (0, num_missing)))
        out, lse = merge_column(out, lse, column)
    if not kept_key.shape[2]:
        return out[..., :value_dim]
    num_heads = query.shape[1]
    kept_key, kept_value = repeat_heads(kept_key, num_heads), repeat_heads(kept_value, num_heads)
    scores = turned_query.float() @ kept_key.float().mT * scaling  # unscaled scores can overflow float16
    return merge_kept(out, lse, scores.masked_fill(~kept_visible, float("-inf")), kept_value)[..., :value_dim]


def flash_band(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Compute sliding-window attention with FlashAttention.

    Returns:
        The output ``(B, H, T, D)`` and the log-sum-exp of the scores ``(B, H, T)``.
    """
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
    """Merge more keys into the result of a softmax.

    Args:
        band_out: output so far, ``(B, H, T, D)``.
        band_lse: log-sum-exp of its scores, ``(B, H, T)``.
        scores: of the additional keys, ``(B, H, T, S)``.
        kept_value: values of the additional keys, ``(B, H, S, D)``.
    """
    total = torch.logaddexp(band_lse, scores.logsumexp(-1))[..., None]
    kept = (scores - total).exp().to(kept_value.dtype) @ kept_value
    return (band_out * (band_lse[..., None] - total).exp()).to(kept.dtype) + kept


def repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Repeat the G heads of keys or values ``(B, G, K, D)`` for H query heads."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)
