"""Attention of one new token to the chosen blocks of a memory, which also stores its query."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ..buffers import StreamingLayer
from .attention import BLOCK_BYTES, _attend_band
from .parts import LOG2E, MIN_TILE, Launch, _finish, _turned, block_of_dims, with_strides

if TYPE_CHECKING:
    from ..layer_memory import LayerMemory


def decode_memory_attention(
    memory: "LayerMemory", layer: StreamingLayer, num_seen: Tensor, base: Tensor, query: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Store the query of one new token per row and compute its attention to the chosen blocks.

    It requires what `can_fuse` requires.

    Args:
        num_seen: ``(B,)``, index of the new token.
        base: ``(B,)``, index of the token that has phase 0.
        query: ``(B, H, 1, D)``.

    Returns:
        The output ``(B, H, 1, D)`` and the log-sum-exp of the scores ``(B, H, 1)`` in float32; 0
        and -inf without any block.
    """
    inv_freq = memory.encoding.inv_freq().to(query.device, torch.float32)
    if not layer.has_positions:
        inv_freq = torch.zeros_like(inv_freq)
    buffers = memory.keys, memory.values, memory.num_chosen, memory.queries, layer.num_arrived
    stream = num_seen, base, inv_freq, memory.encoding.interleaved, scaling
    out, lse = decode_blocks(query[:, :, 0], *buffers, *stream, memory.options.block_size, memory.shape.window)
    return out[:, :, None], lse[:, :, None]


@custom_op("sinklm::decode_memory_attention", mutates_args=("queries", "num_arrived"))
def decode_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_chosen: Tensor,
    queries: Tensor,
    num_arrived: Tensor,
    num_seen: Tensor,
    base: Tensor,
    inv_freq: Tensor,
    interleaved: bool,
    scaling: float,
    block_size: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    block = max(MIN_TILE, BLOCK_BYTES // (query.element_size() * block_of_dims(query.shape[-1])))
    launch = Launch(query, keys.shape[1], keys.shape[2], block, num_first=0)
    query, row_stride, head_stride = with_strides(query)
    with torch.cuda.device_of(query):
        _memory_kernel[launch.grid](
            *(query, row_stride, head_stride, keys, values, num_chosen, queries, num_arrived, num_seen, base),
            *(inv_freq, launch.parts, launch.part_lse, launch.out, launch.lse),
            SCALING=scaling,
            BLOCK_SIZE=block_size,
            PHASE=window + block_size,
            NUM_KEYS=keys.shape[2],
            NUM_QUERIES=queries.shape[2],
            HALF_ROTARY=inv_freq.shape[0],
            INTERLEAVED=interleaved,
            **{name: value for name, value in launch.constants.items() if name != "BLOCK_KEPT"},
            num_warps=4,
            num_stages=3,
        )
    return launch.out, launch.lse


@decode_blocks.register_fake
def _(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@triton.jit
def _memory_kernel(
    query, query_row_stride, query_head_stride, keys, values, num_chosen, last_queries, num_arrived, num_seen, base,
    inv_freq, parts, part_lse, out, lse,
    SCALING: tl.constexpr, BLOCK_SIZE: tl.constexpr, PHASE: tl.constexpr, NUM_KEYS: tl.constexpr,
    NUM_QUERIES: tl.constexpr, NUM_GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS_PER_SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program per group of heads, row and split of the keys. The first one stores the queries."""
    SCALE: tl.constexpr = SCALING * LOG2E
    row_group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    dims, heads = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HEADS)
    has_dim, has_head = dims < DIM, heads < HEADS
    head_mask = has_head[:, None] & has_dim[None, :]
    query += row * query_row_stride + group * HEADS * query_head_stride
    keys, values = keys + row_group * NUM_KEYS * DIM, values + row_group * NUM_KEYS * DIM

    token = tl.load(num_seen + row)
    turned = _turned(
        query, query_head_stride, heads, has_head, inv_freq, PHASE - (token - tl.load(base + row)),
        DIM, dims, HALF_ROTARY, INTERLEAVED,
    )  # fmt: skip
    queries = turned.to(last_queries.dtype.element_ty)
    if split == 0:
        rows = (row_group * HEADS + heads) * NUM_QUERIES + token % NUM_QUERIES
        scaled = (queries.to(tl.float32) * SCALING).to(queries.dtype)
        tl.store(last_queries + rows[:, None] * DIM + dims[None, :], scaled, mask=head_mask)

    num_visible = tl.load(num_chosen) * BLOCK_SIZE
    peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    peak, total, mixed = _attend_band(
        queries, keys, values, split * BLOCKS_PER_SPLIT * BLOCK, num_visible, -1,  # no slot is being written
        dims, has_dim, peak, total, mixed, SCALE, NUM_KEYS, DIM, BLOCK, BLOCKS_PER_SPLIT,
    )  # fmt: skip
    _finish(
        row_group, split, heads, has_head, dims, has_dim, peak, total, mixed, num_arrived, parts, part_lse, out, lse,
        HEADS, DIM, NUM_SPLITS, BLOCK_SPLITS,
    )  # fmt: skip
