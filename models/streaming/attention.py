"""Softmax over kept keys and a band of recent ones, as one call of `scaled_dot_product_attention`."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Grouped-query attention ``(B, H, T, D)``; ``key`` ``(B, G, K, D)`` and ``value`` ``(B, G, K, V)`` may have fewer
    heads. ``mask`` is boolean (True is visible) or added, and broadcasts to ``(B, H, T, K)``.
    """
    (batch_size, num_heads, num_queries, _), num_groups = query.shape, key.shape[1]
    if num_queries == 1 and num_heads > num_groups:  # heads of a group take the place of queries: nothing is repeated
        query = query.view(batch_size, num_groups, num_heads // num_groups, -1)
        if mask is not None and mask.shape[1] == num_heads:
            mask = mask.reshape(mask.shape[0], num_groups, num_heads // num_groups, -1)
    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # the fused kernels want one head size
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    grouped = query.shape[1] != num_groups
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
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
) -> Tensor:
    """One softmax over kept keys, which see ``turned_query``, and band keys, which see ``query``.

    The two phases of a query stand side by side, and each key has zeros where the other kind reads: the scores of both
    kinds come out of one product of ``(D + rotary_dim)`` dimensions, and nothing has to be merged.
    """
    zeros_kept = kept_key.new_zeros(*kept_key.shape[:-1], rotary_dim)
    zeros_band = band_key.new_zeros(*band_key.shape[:-1], rotary_dim)
    both_phases = torch.cat((turned_query[..., :rotary_dim], query), dim=-1)
    kept = torch.cat((kept_key[..., :rotary_dim], zeros_kept, kept_key[..., rotary_dim:]), dim=-1)
    band = torch.cat((zeros_band, band_key), dim=-1)
    return attention(both_phases, torch.cat((kept, band), dim=2), value, mask, scaling)
