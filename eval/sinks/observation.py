"""One forward pass, layer by layer: what enters it, its queries, keys, values and attention maps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """A layer on a batch of sequences of T positions, the model's own sinks among them; H heads, G of keys and values.

    ``attention`` is what the model multiplies its values with. Its rows sum to less than 1 where a model can attend
    to no token at all.
    """

    hidden_states: Tensor  # (B, T, D), the residual stream where it enters the layer
    queries: Tensor | None  # (B, H, T, d), rotated; None for families that compute attention in code of their own
    keys: Tensor  # (B, G, T, d), rotated
    values: Tensor  # (B, G, T, d)
    attention: Tensor  # (B, H, T, T)


@torch.inference_mode()
def observe(model: PreTrainedModel, ids: Tensor) -> list[Layer]:
    """All layers of a causal language model of transformers on ``ids`` ``(B, T)``.

    Raises:
        ValueError: the model has no attention maps (linear attention, state spaces), or transformers shows wrong ones.
    """
    if model.config.model_type == "falcon" and model.config.alibi:
        raise ValueError("transformers adds the ALiBi biases of Falcon-RW twice where it shows attention maps")
    cache = DynamicCache()  # without a config: layers with a window of their own keep all keys too
    with _eager_attention(model) as queries:
        outputs: Any = model(
            ids.to(model.device),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
            output_hidden_states=True,
            logits_to_keep=1,
        )
    maps = getattr(outputs, "attentions", None) or ()
    if not maps or any(attention is None for attention in maps) or len(maps) != len(cache.layers):
        raise ValueError(f"a model of type {model.config.model_type!r} does not show an attention map for each layer")
    if len(queries) != len(maps):
        queries = [None] * len(maps)
    states = outputs.hidden_states[: len(maps)]  # without the last, which is normalised and enters no layer
    return [
        Layer(hidden_states, query, cached.keys, cached.values, attention)
        for hidden_states, query, cached, attention in zip(states, queries, cache.layers, maps, strict=True)
    ]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[list[Tensor | None]]:
    """Let a model compute its attention maps, and collect the queries with which it does, layer after layer.

    A family's own eager attention is known only to whoever asks `AttentionInterface` for another one: so listen there.
    """
    queries: list[Tensor | None] = []

    def get_interface(interface: AttentionInterface, name: str, eager: Callable) -> Callable:
        def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            queries.append(query)
            return eager(module, query, *args, **kwargs)

        return attention

    users_choice, original = model.config._attn_implementation, AttentionInterface.get_interface
    model.config._attn_implementation = "eager"
    AttentionInterface.get_interface = get_interface
    try:
        yield queries
    finally:
        AttentionInterface.get_interface = original
        model.config._attn_implementation = users_choice
