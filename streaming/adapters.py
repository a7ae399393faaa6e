"""Streaming attention for the families whose attention code does not stream as it is.

Most of them do not use transformers' attention interface. Each function replaces the ``forward``
method of the family's attention module during passes with a streaming cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from ..models.cache_argument import CACHE
from .encodings import Rotary
from .steps import Pass

if TYPE_CHECKING:
    from .cache import StreamingCache

STEERED = "streaming_cache"  # argument that passes the cache to the layers
CODEGEN_SHARDS = 4  # of the model-parallel training; each has its own queries, values and keys
CacheRef = Callable[[], "StreamingCache"]


@dataclass(frozen=True)
class Adapter:
    """Replacement of a family's attention.

    Args:
        module_name: suffix of the attention modules' names.
        attend: maps ``(cache_ref, module, hidden_states (B, T, D), **kwargs)`` to
            ``(output (B, T, D), None)``. The reference to the cache is weak: modules outlive it.
        mask_shape: shape of the mask of ones to pass to a decoder that requires a mask.
        takes_positions_from_cache: `attend` uses the cache's positions, and the decoder gets
            zeros, because a stream can exceed the decoder's table of positions.
    """

    module_name: str
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    mask_shape: tuple[int, ...] | None = None
    takes_positions_from_cache: bool = False

    def modules(self, decoder: nn.Module) -> list[nn.Module]:
        return [module for name, module in decoder.named_modules() if name.endswith("." + self.module_name)]


def step_of(cache_ref: CacheRef) -> Pass:
    """Return the current pass."""
    step = cache_ref().step
    assert step is not None
    return step


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """Reshape ``(B, T, H * D)`` to ``(B, H, T, D)``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """Reshape ``(B, H, T, D)`` to ``(B, T, H * D)``."""
    return states.transpose(1, 2).flatten(2)


def falcon_attention(
    cache_ref: CacheRef,
    module: FalconAttention,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    states = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in states)  # (B, heads, T, D)
    if module.num_kv_heads and module.new_decoder_architecture:  # `_split_heads` has repeated keys and values
        repeats = module.num_heads // module.num_kv_heads
        key, value = key[:, ::repeats], value[:, ::repeats]
    if alibi is None and position_embeddings is not None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    out = step_of(cache_ref).attend(module.layer_idx, query, key, value, module.inv_norm_factor)
    return module.dense(merge_heads(out)), None


def mpt_attention(
    cache_ref: CacheRef, module: MptAttention, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (split_heads(states, module.n_heads) for states in qkv.chunk(3, dim=-1))
    out = step_of(cache_ref).attend(module.layer_idx or 0, query, key, value, module.softmax_scale)
    return module.out_proj(merge_heads(out)), None


def gptj_attention(
    cache_ref: CacheRef, module: GPTJAttention, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (split_heads(proj(hidden_states), module.num_attention_heads) for proj in projections)
    return rotated_attention(cache_ref, module, query, key, value), None


def codegen_attention(
    cache_ref: CacheRef, module: CodeGenAttention, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    shards = module.qkv_proj(hidden_states).unflatten(-1, (CODEGEN_SHARDS, -1)).chunk(3, dim=-1)
    query, value, key = (split_heads(states.flatten(-2), module.num_attention_heads) for states in shards)
    return rotated_attention(cache_ref, module, query, key, value), None


def rotated_attention(
    cache_ref: CacheRef, module: GPTJAttention | CodeGenAttention, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Rotate queries and keys ``(B, H, T, D)`` by the cache's positions, attend, and project."""
    step = step_of(cache_ref).of(module.layer_idx)
    rotary = step.encoding
    assert isinstance(rotary, Rotary)
    phases = rotary.phases(step.on(query.device).position_ids, query)
    query, key = rotary.turn(query, phases), rotary.turn(key, phases)
    out = step.attend(module.layer_idx, query, key, value, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(merge_heads(out)))


def bloom_attention(
    cache_ref: CacheRef, module: BloomAttention, hidden_states: Tensor, residual: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    states = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    query, key, value = (x.transpose(1, 2) for x in states.unbind(-2))  # (B, H, T, D)
    out = step_of(cache_ref).attend(module.layer_idx, query, key, value, module.inv_norm_factor)
    return residual + module.dense(merge_heads(out)), None


def own_attention(cache_ref: CacheRef, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call the module's own method, and pass the cache to the attention function only.

    Layers of StableLM and Nemotron do not pass it on. Attention of Llama 4 would scale the queries
    by the length of the stream. Positions within the cache are below the first step of that scale,
    see `families.num_equal_positions`.
    """
    return type(module).forward(module, *args, **kwargs | {CACHE: None, STEERED: cache_ref()})


BLOOM = Adapter("self_attention", bloom_attention, mask_shape=(1, 1))
CODEGEN = Adapter("attn", codegen_attention, takes_positions_from_cache=True)
OWN = Adapter("self_attn", own_attention)
FALCON = Adapter("self_attention", falcon_attention, mask_shape=(1, 1))
MPT = Adapter("attn", mpt_attention, mask_shape=(1, 1, 1, 1))
GPTJ = Adapter("attn", gptj_attention, takes_positions_from_cache=True)


def identity_mask(adapter: Adapter | None, batch_size: int, device: torch.device) -> Tensor | None:
    """Return a mask of ones for a decoder that requires a mask, None for the others."""
    if adapter is None or adapter.mask_shape is None:
        return None
    return torch.ones(adapter.mask_shape, dtype=torch.long, device=device).expand(
        batch_size, *(-1 for _ in adapter.mask_shape[1:])
    )
