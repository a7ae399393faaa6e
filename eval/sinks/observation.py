"""Collects the input, queries, keys, values and attention map of each layer in a forward pass."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, cache_utils
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ...models.attention import (
    COLUMN_ATTENTION,
    RULE_ATTENTION,
    register_column_attention,
    register_window_attention,
)
from ...models.cache_argument import CACHE
from ...streaming.layers import own_rules
from ...streaming.rule import StreamShape
from ...streaming.wrappers import decoder_of

# Stands for a layer that uses the keys of another one. Older caches leave out such layers.
NO_KEYS = getattr(cache_utils, "DummyLayer", ())


@dataclass(frozen=True)
class Layer:
    """The states of a layer: B sequences, T positions (sinks included), H heads, G groups.

    ``attention`` is the matrix that multiplies the values. Its rows sum to less than 1 if the model
    can attend to no token.
    """

    hidden_states: Tensor  # (B, T, D), the residual stream at the layer's input
    queries: Tensor | None  # (B, H, T, d), rotated; None for families that do not use AttentionInterface
    keys: Tensor  # (B, G, T, d), rotated
    values: Tensor  # (B, G, T, d)
    attention: Tensor  # (B, H, T, T)
    rule: StreamShape | None = None  # of a windowed layer


@torch.inference_mode()
def observe(model: PreTrainedModel, ids: Tensor) -> list[Layer]:
    """Run a causal language model on ``ids`` ``(B, T)`` and return the states of all layers.

    Raises:
        ValueError: the model has no attention maps (linear attention, state spaces), or
            transformers returns wrong ones, or it has several residual streams.
    """
    if model.config.model_type == "falcon" and model.config.alibi:
        raise ValueError(
            "Falcon-RW is not supported: transformers adds its ALiBi biases twice when it returns attention maps"
        )
    cache = _full_cache(model)
    with _observed_attention(model) as attended:
        outputs: Any = model(
            ids.to(model.device),
            use_cache=True,
            output_attentions=True,
            output_hidden_states=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
    maps = getattr(outputs, "attentions", None) or ()
    # The cache of DeepSeek has compressed states in place of keys and values.
    inputs: Sequence[Inputs] = attended or [(None, layer.keys, layer.values) for layer in cache.layers]
    if not maps or any(attention is None for attention in maps) or len(maps) != len(inputs):
        raise no_maps(model)
    states = outputs.hidden_states[: len(maps)]  # without the last, which is the normalised output
    if states[0].ndim != 3:
        raise ValueError(
            f"models of type {model.config.model_type!r} are not supported: they have several residual streams"
        )
    rules = own_rules(decoder_of(model).config)
    return [
        Layer(hidden_states, *of_layer, attention, rule)
        for hidden_states, of_layer, attention, rule in zip(states, inputs, maps, rules, strict=True)
    ]


def observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Call the eager attention of the module's family and record queries, keys and values."""
    _attended.get().append((query, key, value))
    if "rule" in kwargs:
        eager = RULE_ATTENTION["eager"]
    else:
        eager = COLUMN_ATTENTION["eager"] if "column" in kwargs else eager_attention_of(type(module))
    return eager(module, query, key, value, attention_mask, **kwargs)


def eager_attention_of(attention: type[nn.Module]) -> Callable:
    """Return ``eager_attention_forward`` of the module that defines this class or its base."""
    modules = (sys.modules[base.__module__] for base in attention.__mro__)
    return next(
        vars(module)["eager_attention_forward"] for module in modules if "eager_attention_forward" in vars(module)
    )


OBSERVED = "sinklm_observed"  # as ``attn_implementation``
Inputs = tuple[Tensor | None, Tensor, Tensor]  # queries, keys and values
_attended: ContextVar[list[Inputs]] = ContextVar("attended")
AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, eager_mask)
register_column_attention(OBSERVED, observed_attention)
register_window_attention(OBSERVED, observed_attention)


@contextmanager
def _observed_attention(model: PreTrainedModel) -> Iterator[list[Inputs]]:
    """Make a model compute attention maps; yields the inputs of AttentionInterface, by layer."""
    attended: list[Inputs] = []
    users_choice = model.config._attn_implementation
    model.config._attn_implementation = OBSERVED
    token = _attended.set(attended)
    try:
        yield attended
    finally:
        _attended.reset(token)
        model.config._attn_implementation = users_choice


def _full_cache(model: PreTrainedModel) -> DynamicCache:
    """Return a cache that keeps all keys, also for layers with a sliding window.

    Raises:
        ValueError: some layers have no keys (linear attention, state spaces).
    """
    cache = DynamicCache(config=model.config)
    if not all(isinstance(layer, (cache_utils.DynamicLayer, NO_KEYS)) for layer in cache.layers):
        raise no_maps(model)
    cache.layers = [layer if isinstance(layer, NO_KEYS) else cache_utils.DynamicLayer() for layer in cache.layers]
    return cache


def no_maps(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"models of type {model.config.model_type!r} are not supported: they do not return an attention map for each "
        "layer"
    )
