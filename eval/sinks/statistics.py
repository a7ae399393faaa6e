"""Statistics of attention sinks, and their means over sequences.

Sink rates follow Gu et al., *When Attention Sink Emerges in Language Models* (ICLR 2025), section
3; massive activations follow Sun et al., *Massive Activations in Large Language Models* (COLM
2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel

from ...models.checked import checked_passes
from ...models.config import num_prepended_sinks
from ...streaming.attention_mass import attention_mass, visible_keys
from .observation import Layer, observe

EPSILON = 0.3
NUM_MAP_POSITIONS = 16  # as in the figures of Xiao et al.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
BATCH_ENTRIES = 2**24  # entries of attention maps per batch, over all layers; bounds memory, not the result


@dataclass(frozen=True)
class MassiveActivation:
    """A hidden dimension that is massive at a position, in ``share`` of the sequences."""

    layer: int
    position: int
    dimension: int
    share: float
    value: float  # mean over those sequences
    ratio: float  # magnitude over the median of its sequence and layer; mean over those sequences


@dataclass(frozen=True)
class Statistics:
    """Means over sequences: L layers, H heads, T positions; float64, on the CPU. See `of_layer`."""

    mass: Tensor  # (L, H, T + 1)
    sink_rate: Tensor  # (L, H, T + 1)
    maps: Tensor  # (L, H, M, M)
    hidden_norm: Tensor  # (L, T)
    key_norm: Tensor  # (L, T)
    value_norm: Tensor  # (L, T)
    key_cosine: Tensor  # (L, T)
    query_cosine: Tensor  # (L, T)
    query_key_cosine: Tensor  # (L, T)
    largest_activation: Tensor  # (L, T)
    median_activation: Tensor  # (L,)
    massive_activations: list[MassiveActivation]


def find_massive(hidden_states: Tensor) -> list[tuple[int, int, float, float]]:
    """Find massive activations in hidden states ``(B, T, D)``.

    These have a magnitude above 100 and at least 1000 times the median magnitude of their sequence.

    Returns:
        position, dimension, value and ratio to the median of each.
    """
    hidden_states = _wide(hidden_states)
    magnitudes = hidden_states.abs()
    ratios = magnitudes / _medians(magnitudes).clamp(min=1e-6)[:, None, None]  # finite even if most are 0
    is_massive = (magnitudes > MASSIVE) & (ratios >= MASSIVE_RATIO)
    _, positions, dimensions = (indices.tolist() for indices in is_massive.nonzero(as_tuple=True))
    found = hidden_states[is_massive].tolist(), ratios[is_massive].tolist()
    return list(zip(positions, dimensions, *found, strict=True))


def of_layer(layer: Layer, epsilon: float) -> dict[str, Tensor]:
    """Return the statistics of each sequence ``(B, …)`` in one layer.

    Norms and cosines are means over heads.

    - ``mass``: see `attention_mass`.
    - ``sink_rate``: 1 if the mass exceeds ``epsilon``, so the position is a sink of this head.
    - ``maps``: the attention among the first `NUM_MAP_POSITIONS`.
    - ``key_cosine``, ``query_cosine``: of each key and each query with the first key.
    - ``query_key_cosine``: of each key with the queries that can attend to it.
    - ``largest_activation``, ``median_activation``: magnitudes in the hidden states, by position
      and over all.

    Cosines of queries are NaN if queries are not available.
    """
    attention, hidden_states, keys = _wide(layer.attention), _wide(layer.hidden_states), _wide(layer.keys)
    is_visible = visible_keys(attention.shape[-1], layer.rule, attention.device)
    mass = attention_mass(attention, is_visible)
    magnitudes = hidden_states.abs()
    return {
        "mass": mass,
        "sink_rate": mass > epsilon,
        "maps": attention[..., :NUM_MAP_POSITIONS, :NUM_MAP_POSITIONS],
        "hidden_norm": hidden_states.norm(dim=-1),
        "key_norm": keys.norm(dim=-1).mean(1),
        "value_norm": _wide(layer.values).norm(dim=-1).mean(1),
        "key_cosine": cosine_similarity(keys, keys[:, :, :1], dim=-1).mean(1),
        **_query_cosines(layer.queries, keys, is_visible),
        "largest_activation": magnitudes.amax(-1),
        "median_activation": _medians(magnitudes),
    }


def measure(
    model: PreTrainedModel, ids: Tensor, *, epsilon: float = EPSILON, progress: Callable[[int], None] | None = None
) -> Statistics:
    """Run sequences ``(N, T - sinks)`` through a model, in batches, and average.

    Args:
        epsilon: attention mass above which a position is a sink of a head.
        progress: called with the number of sequences done since the last call.

    Raises:
        ValueError: the sequences are longer than the model's maximum, or has no attention maps, or
            its outputs are not finite.
    """
    num_positions = ids.shape[1] + num_prepended_sinks(model.config)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and num_positions > longest:
        raise ValueError(f"--seq-length {num_positions} is more than the model's {longest} positions: lower it")
    sums: dict[str, Tensor] = {}
    massive: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for batch in ids.split(_batch_size(model, num_positions)):
        with checked_passes(model):
            layers = observe(model, batch)
        found = [of_layer(layer, epsilon) for layer in layers]
        for name in found[0]:
            total = torch.stack([values[name].sum(0, dtype=torch.float64).cpu() for values in found])  # (L, …)
            sums[name] = total + sums.get(name, 0)
        for i, layer in enumerate(layers):
            for position, dimension, value, ratio in find_massive(layer.hidden_states):
                massive.setdefault((i, position, dimension), []).append((value, ratio))
        if progress is not None:
            progress(len(batch))
    means: dict[str, Any] = {name: total / len(ids) for name, total in sums.items()}
    return Statistics(**means, massive_activations=summarize_massive(massive, len(ids)))


def _query_cosines(queries: Tensor | None, keys: Tensor, is_visible: Tensor) -> dict[str, Tensor]:
    if queries is None:
        unknown = keys.new_full((keys.shape[0], keys.shape[2]), float("nan"))
        return {"query_cosine": unknown, "query_key_cosine": unknown}
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)  # one for each query head
    cosines = normalize(_wide(queries), dim=-1) @ normalize(keys, dim=-1).mT  # (B, H, queries, keys)
    return {
        "query_cosine": cosines[..., 0].mean(1),
        "query_key_cosine": attention_mass(cosines * is_visible, is_visible)[..., :-1].mean(1),
    }


def summarize_massive(
    massive: dict[tuple[int, int, int], list[tuple[float, float]]], num_sequences: int
) -> list[MassiveActivation]:
    """Return the activations, the most common ones first."""
    summary = []
    for (layer, position, dimension), found in massive.items():
        values, ratios = zip(*found, strict=True)
        means = sum(values) / len(found), sum(ratios) / len(found)
        summary.append(MassiveActivation(layer, position, dimension, len(found) / num_sequences, *means))
    return sorted(summary, key=lambda a: (-a.share, -abs(a.value)))


def _medians(magnitudes: Tensor) -> Tensor:
    """Return the median ``(B,)`` of each sequence of ``(B, T, D)``."""
    return magnitudes.flatten(1).median(dim=1).values


def _wide(states: Tensor) -> Tensor:
    """Convert to float32, or keep a wider type."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _batch_size(model: PreTrainedModel, num_positions: int) -> int:
    entries = model.config.num_hidden_layers * model.config.num_attention_heads * num_positions**2
    return max(1, BATCH_ENTRIES // entries)
