"""How much attention each token gets, from maps of models with and without windows."""

import torch
from torch import Tensor

from .rule import StreamShape


def visible_keys(num_positions: int, rule: StreamShape | None, device: torch.device) -> Tensor:
    """Return which keys the queries of a layer see, ``(T, T)``, without a cache.

    Args:
        rule: of a windowed layer; None for full attention.
    """
    queries, keys = torch.arange(num_positions, device=device)[:, None], torch.arange(num_positions, device=device)
    is_visible = keys <= queries
    return is_visible if rule is None else is_visible & ((keys >= queries - rule.window) | (keys < rule.num_kept))


def attention_mass(attention: Tensor, is_visible: Tensor) -> Tensor:
    """Reduce attention maps ``(…, T, T)``, queries by keys, to the attention mass ``(…, T + 1)``.

    Entry k < T is the mean attention to token k from the queries that can attend to it:
    ``α_k = 1/(T-k+1) Σ_{i≥k} A_ik`` in Gu et al., counted from 1. In a layer with a window, fewer
    queries can. Entry T is the mean fraction of attention that goes to no token, ``1 - Σ_k A_ik``.

    Args:
        is_visible: see `visible_keys`.
    """
    num_queries = is_visible.sum(0)
    to_none = (1 - attention.sum(-1)).mean(-1, keepdim=True)
    return torch.cat([attention.sum(-2) / num_queries, to_none], dim=-1)
