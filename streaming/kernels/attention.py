"""Attention of one new token in one kernel: write its key and value, then read all slots once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ..buffers import StreamingLayer
from ..encodings import Rotary
from ..quantized import QuantizedLayer
from ..rule import LARGEST, StreamShape
from .memory import _attend_memory
from .parts import LOG2E, MIN_TILE, Launch, _attend_band, _attend_new, _finish, block_of_dims, frequencies, with_strides
from .quantized_attention import decode_quantized_attention

BLOCK_BYTES = 8192  # keys that a program processes at a time, in bytes


def can_fuse(encoding: Rotary, layer: StreamingLayer, query: Tensor) -> bool:
    """Whether a kernel can be used.

    It requires CUDA, not float64, values as wide as keys, that the first dimensions of a head are
    rotated, and that 32 bits can count the dimensions of all slots.
    """
    keys = layer.kept_keys
    values = layer.kept_values if isinstance(layer, QuantizedLayer) else layer.values
    has_one_type = query.dtype == keys.dtype == values.dtype != torch.float64
    has_one_size = keys.shape[-1] == values.shape[-1] and layer.shape.num_slots * keys.shape[-1] <= LARGEST
    return query.is_cuda and has_one_type and has_one_size and encoding.start == 0


def decode_attention(
    shape: StreamShape,
    encoding: Rotary,
    layer: StreamingLayer,
    num_seen: Tensor,
    base: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Store the key and value of one new token per row and compute its attention.

    If the layer has a memory, the token also sees its chosen blocks, and its query is stored there.

    Args:
        num_seen: ``(B,)``, index of the new token.
        base: ``(B,)``, index of the token that has phase 0.
        query: ``(B, H, 1, D)``.
        key, value: ``(B, G, 1, D)``.

    Returns:
        The output ``(B, H, 1, D)`` and the log-sum-exp of the scores ``(B, H, 1)`` in float32.
    """
    inv_freq = frequencies(encoding, query, layer.has_positions)
    states = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    stream = (num_seen, base, inv_freq, shape.num_kept, shape.window, encoding.interleaved, scaling)
    if isinstance(layer, QuantizedLayer):
        out, lse = decode_quantized_attention(*states, *layer.buffers.values(), *stream, layer.num_recent)
    else:
        chosen: tuple = (None, None, None, None, 0)
        if (memory := layer.memory) is not None:
            chosen = memory.keys, memory.values, memory.num_chosen, memory.queries, memory.options.block_size
        out, lse = decode_plain_attention(*states, *layer.buffers.values(), *stream, *chosen)
    return out[:, :, None], lse[:, :, None]


@custom_op("sinklm::decode_attention", mutates_args=("keys", "values", "kept_keys", "num_arrived", "memory_queries"))
def decode_plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    kept_keys: Tensor,
    num_arrived: Tensor,
    num_seen: Tensor,
    base: Tensor,
    inv_freq: Tensor,
    num_kept: int,
    window: int,
    interleaved: bool,
    scaling: float,
    memory_keys: Tensor | None,
    memory_values: Tensor | None,
    num_chosen: Tensor | None,
    memory_queries: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    num_memory_keys = 0 if memory_keys is None else memory_keys.shape[2]
    num_queries = 0 if memory_queries is None else memory_queries.shape[2]
    block = max(MIN_TILE, BLOCK_BYTES // (query.element_size() * block_of_dims(query.shape[-1])))
    num_first = 1  # for the new key and the kept keys
    launch = Launch(query, key.shape[1], window + 1, block, num_first, num_memory_keys)
    with torch.cuda.device_of(query):
        _decode_kernel[launch.grid](
            *with_strides(query, key, value),
            *(keys, values, kept_keys, num_arrived, num_seen, base, inv_freq),
            *(memory_keys, memory_values, num_chosen, memory_queries),
            *(launch.parts, launch.part_lse, launch.out, launch.lse),
            SCALING=scaling,
            NUM_KEPT=num_kept,
            WINDOW=window,
            HALF_ROTARY=inv_freq.shape[0],
            INTERLEAVED=interleaved,
            BLOCK_SIZE=block_size,
            NUM_QUERIES=num_queries,
            MEMORY_KEYS=num_memory_keys,
            MEMORY_SPLITS=launch.num_memory_splits,
            **launch.constants,
            num_warps=4,
            num_stages=3,
        )
    return launch.out, launch.lse


@decode_plain_attention.register_fake
def _(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@triton.jit
def _decode_kernel(
    query, key, value,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    keys, values, kept_keys, num_arrived, num_seen, base, inv_freq,
    memory_keys, memory_values, num_chosen, memory_queries, parts, part_lse, out, lse,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_QUERIES: tl.constexpr, MEMORY_KEYS: tl.constexpr, MEMORY_SPLITS: tl.constexpr, NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEPT: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program per group of heads, row and split: the new and kept keys, slots, or a memory."""
    SCALE: tl.constexpr = SCALING * LOG2E
    MEMORY_START: tl.constexpr = NUM_SPLITS - MEMORY_SPLITS
    NUM_SLOTS: tl.constexpr = NUM_KEPT + WINDOW + 1
    row_group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    dims, heads = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HEADS)
    has_dim, has_head = dims < DIM, heads < HEADS
    query += row * query_row_stride + group * HEADS * query_head_stride
    keys, values = keys + row_group * NUM_SLOTS * DIM, values + row_group * NUM_SLOTS * DIM

    token = tl.load(num_seen + row)
    new_slot = tl.where(token < NUM_KEPT, token, NUM_KEPT + (token - NUM_KEPT) % (WINDOW + 1))
    head_mask = has_head[:, None] & has_dim[None, :]
    queries = tl.load(query + heads[:, None] * query_head_stride + dims[None, :], mask=head_mask, other=0.0)
    peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)

    if split == 0:
        new_key = tl.load(key + row * key_row_stride + group * key_head_stride + dims, mask=has_dim, other=0.0)
        new_value = tl.load(value + row * value_row_stride + group * value_head_stride + dims, mask=has_dim, other=0.0)
        kept_keys += row_group * (NUM_KEPT + 1) * DIM
        tl.store(keys + new_slot * DIM + dims, new_key, mask=has_dim)
        tl.store(values + new_slot * DIM + dims, new_value, mask=has_dim)
        tl.store(kept_keys + tl.minimum(token, NUM_KEPT) * DIM + dims, new_key, mask=has_dim)
        peak, total, mixed = _attend_new(
            query, query_head_stride, heads, has_head, queries, new_key, new_value, kept_keys, values,
            token, token - tl.load(base + row), inv_freq, dims, has_dim, peak, total, mixed,
            SCALE, NUM_KEPT, WINDOW, DIM, HALF_ROTARY, INTERLEAVED, BLOCK_KEPT,
        )  # fmt: skip
    elif MEMORY_SPLITS > 0 and split >= MEMORY_START:
        peak, total, mixed = _attend_memory(
            query, query_head_stride, heads, has_head, memory_keys, memory_values, num_chosen, memory_queries,
            row_group, split - MEMORY_START, token, token - tl.load(base + row), inv_freq, dims, has_dim,
            peak, total, mixed,
            SCALING, WINDOW, BLOCK_SIZE, NUM_QUERIES, MEMORY_KEYS, HEADS, DIM, HALF_ROTARY, INTERLEAVED,
            BLOCK, BLOCKS_PER_SPLIT,
        )  # fmt: skip
    else:
        peak, total, mixed = _attend_band(
            queries, keys, values, NUM_KEPT + (split - 1) * BLOCKS_PER_SPLIT * BLOCK, tl.minimum(token, NUM_SLOTS),
            new_slot, dims, has_dim, peak, total, mixed, SCALE, NUM_SLOTS, DIM, BLOCK, BLOCKS_PER_SPLIT,
        )  # fmt: skip
    _finish(
        row_group, split, heads, has_head, dims, has_dim, peak, total, mixed, num_arrived, parts, part_lse, out, lse,
        HEADS, DIM, NUM_SPLITS, BLOCK_SPLITS,
    )  # fmt: skip
