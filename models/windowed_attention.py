"""Attention of windowed layers, with gradients, for every arm.

`windows` has the rule. On CUDA in half precision, `fused_windows` computes it without a mask. For
everything else (CPU, float32, float64, padding, a static cache, dropout) one softmax with a mask
does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .banded_attention import two_phase_states
from .fused_windows import fused_windowed_attention, is_fused
from .sink_column import SinkColumn, explicit_attention
from .windows import WindowRule


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: WindowRule,
    column: SinkColumn | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention under the rule of windowed layers.

    Args:
        query: ``(B, H, T, D)``, rotated.
        key, value: ``(B, H, K, D)`` of all tokens, keys rotated.
        rule: which keys each query sees.
        column: of the arm.
        scaling: factor of the scores.
        dropout: share of probabilities to drop.

    Returns:
        ``(B, H, T, D)``.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if is_fused(query, rule, dropout):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return fused_windowed_attention(query, key, value, rule, column, scaling).transpose(1, 2)
    query, key, value, mask = masked_states(query, key, value, rule)
    if column is not None:
        return explicit_attention(query, key, value, mask, column, scaling, dropout)[0]
    value_dim = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - value_dim))  # the fused kernels require one head size
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out[..., :value_dim]


def windowed_probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: WindowRule,
    column: SinkColumn | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Like `windowed_attention`, and also return the probabilities ``(B, H, T, K)`` of the keys."""
    num_keys = key.shape[2]
    query, both_keys, both_values, mask = masked_states(query, key, value, rule)
    out, weights = explicit_attention(query, both_keys, both_values, mask, column, scaling, dropout)
    kept, band = weights.split([weights.shape[-1] - num_keys, num_keys], dim=-1)
    places = places_of_kept(rule, num_keys)[:, None, None].expand(kept.shape)
    return out, band.scatter_add(-1, places, kept)


def masked_states(query: Tensor, key: Tensor, value: Tensor, rule: WindowRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and the mask of one softmax over S kept tokens and K keys.

    The kept tokens come first and are repeated among the K keys, of which the mask shows the band
    only. Queries and keys have D dimensions and the rotated ones again, see `two_phase_states`. The
    mask is ``(1 or B, 1, T, S + K)``.
    """
    turned = turn_back(query, rule.cos, rule.sin)
    places = places_of_kept(rule, key.shape[2])
    kept_key, kept_value = at_places(key, places), at_places(value, places)
    query, key = two_phase_states(query, turned, kept_key, key, slice(0, rule.cos.shape[-1]))
    return query, key, torch.cat((kept_value, value), dim=2), visible_keys(rule, places.shape[1], value.shape[2])


def turn_back(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of ``query`` ``(B, H, T, D)`` by the negative angle."""
    half = cos.shape[-1] // 2
    cos, sin = (table[:, None, :, :half].to(query.dtype) for table in (cos, sin))
    first, second, rest = query.split([half, half, query.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def places_of_kept(rule: WindowRule, num_keys: int) -> Tensor:
    """Return where the kept tokens are among the keys, ``(1 or B, S)``, or 0 if missing."""
    indices = torch.arange(min(rule.num_kept, num_keys), device=rule.queries.device)
    if rule.is_token is None:
        return indices[None]
    return (rule.tokens_of_keys(num_keys)[:, None] == indices[:, None]).long().argmax(-1)


def at_places(states: Tensor, places: Tensor) -> Tensor:
    """Return the states ``(B, H, S, D)`` at ``places`` ``(1 or B, S)`` of ``(B, H, K, D)``."""
    batch_size, num_heads, _, dim = states.shape
    return states.gather(2, places[:, None, :, None].expand(batch_size, num_heads, -1, dim))


def visible_keys(rule: WindowRule, num_kept: int, num_keys: int) -> Tensor:
    """Return the mask ``(1 or B, 1, T, S + K)`` over kept tokens and keys; True is visible.

    Padding sees itself, so that its softmax is not empty.
    """
    queries, keys = rule.queries[:, :, None], rule.tokens_of_keys(num_keys)[:, None]
    kept = torch.arange(num_kept, device=queries.device) < queries - rule.width
    band = (keys <= queries) & (keys >= queries - rule.width)
    if rule.is_token is not None:
        own = torch.arange(num_keys, device=queries.device) == _own_places(rule)[:, None]
        band = (band & (keys >= 0)) | own
    return torch.cat((kept.expand(*band.shape[:-1], -1), band), dim=-1)[:, None]


def _own_places(rule: WindowRule) -> Tensor:
    """Return where the keys of the queries are, ``(T,)``, if a mask was given."""
    assert rule.is_token is not None
    num_tokens, num_queries = rule.is_token.shape[1], rule.queries.shape[1]
    return torch.arange(num_tokens - num_queries, num_tokens, device=rule.queries.device)
