"""Attention of one new token in one kernel: write its key and value, then read all slots once.

The slots are split between programs (Flash-Decoding, Dao et al. 2023), so that a single stream uses
the whole GPU. The last program of a group of heads to finish merges the parts. Instead of rotating
the kept keys for every token, the kernel scores them with a rotated query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ..buffers import StreamingLayer
from ..encodings import Rotary
from ..quantized import QuantizedLayer
from ..rule import StreamShape

BLOCK_BYTES = 8192  # keys that a program processes at a time, in bytes
PROGRAMS_PER_PROCESSOR = 2  # enough to saturate the memory bandwidth
MAX_SPLITS = 31  # of the band; with that of the kept keys a power of 2, all loaded at once by the merging program
MIN_TILE = 16  # minimum size of a matrix product on tensor cores
LOG2E = tl.constexpr(1.4426950408889634)


def can_fuse(encoding: Rotary, layer: StreamingLayer, query: Tensor) -> bool:
    """Whether the kernel can be used.

    It requires CUDA, not float64, values as wide as keys, none of them quantized, and that the
    first dimensions of a head are rotated.
    """
    if isinstance(layer, QuantizedLayer):
        return False
    has_one_type = query.dtype == layer.keys.dtype == layer.values.dtype != torch.float64
    return query.is_cuda and has_one_type and layer.keys.shape == layer.values.shape and encoding.start == 0


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

    Args:
        num_seen: ``(B,)``, index of the new token.
        base: ``(B,)``, index of the token that has phase 0.
        query: ``(B, H, 1, D)``.
        key, value: ``(B, G, 1, D)``.

    Returns:
        The output ``(B, H, 1, D)`` and the log-sum-exp of the scores ``(B, H, 1)`` in float32.
    """
    query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
    buffers = (layer.keys, layer.values, layer.kept_keys, layer.num_arrived)
    inv_freq = encoding.inv_freq().to(query.device, torch.float32)
    if not layer.has_positions:
        inv_freq = torch.zeros_like(inv_freq)
    out, lse = _decode_attention(
        *(query, key, value, *buffers, num_seen, base, inv_freq),
        *(shape.num_kept, shape.window, encoding.interleaved, scaling),
    )
    return out[:, :, None], lse[:, :, None]


@custom_op("sinklm::decode_attention", mutates_args=("keys", "values", "kept_keys", "num_arrived"))
def _decode_attention(
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
) -> tuple[Tensor, Tensor]:
    (batch_size, num_heads, head_dim), num_groups = query.shape, key.shape[1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    block_dim = max(MIN_TILE, triton.next_power_of_2(head_dim))
    block = max(MIN_TILE, BLOCK_BYTES // (query.element_size() * block_dim))
    num_blocks = triton.cdiv(window + 1, block)
    num_splits = min(MAX_SPLITS, max(1, num_programs(query.device) // (batch_size * num_groups)))
    blocks_per_split = triton.cdiv(num_blocks, min(num_blocks, num_splits))
    num_splits = 1 + triton.cdiv(num_blocks, blocks_per_split)  # split 0: the new key and the kept keys
    parts = query.new_empty((batch_size * num_heads, num_splits, head_dim), dtype=torch.float32)
    part_lse = query.new_empty((batch_size * num_heads, num_splits), dtype=torch.float32)
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch_size, num_heads), dtype=torch.float32)
    with torch.cuda.device_of(query):
        _decode_kernel[batch_size * num_groups, num_splits](
            *(query, key, value, *(stride for state in (query, key, value) for stride in state.stride()[:2])),
            *(keys, values, kept_keys, num_arrived, num_seen, base, inv_freq, parts, part_lse, out, lse),
            SCALING=scaling,
            NUM_KEPT=num_kept,
            WINDOW=window,
            NUM_GROUPS=num_groups,
            HEADS=num_heads // num_groups,
            BLOCK_HEADS=max(MIN_TILE, triton.next_power_of_2(num_heads // num_groups)),
            DIM=head_dim,
            BLOCK_DIM=block_dim,
            HALF_ROTARY=inv_freq.shape[0],
            INTERLEAVED=interleaved,
            BLOCK=block,
            BLOCK_KEPT=MIN_TILE,
            BLOCKS_PER_SPLIT=blocks_per_split,
            NUM_SPLITS=num_splits,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            num_warps=4,
            num_stages=3,
        )
    return out, lse


@_decode_attention.register_fake
def _(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


def num_programs(device: torch.device) -> int:
    """Return the number of programs that fills the device."""
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _turned(query, stride, heads, has_head, inv_freq, steps, DIM: tl.constexpr, dims, HALF: tl.constexpr, INTERLEAVED):
    """Return the queries ``(heads, dims)`` rotated by ``steps`` positions."""
    if INTERLEAVED:
        is_first, partner_dims, pair = dims % 2 == 0, dims ^ 1, dims // 2
    else:
        is_first = dims < HALF
        partner_dims, pair = tl.where(is_first, dims + HALF, dims - HALF), dims % HALF
    is_rotary = dims < 2 * HALF
    rows = query + heads[:, None] * stride
    state = tl.load(rows + dims[None, :], mask=has_head[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)
    partner = tl.load(rows + partner_dims[None, :], mask=has_head[:, None] & is_rotary[None, :], other=0.0)
    angle = steps.to(tl.float32) * tl.load(inv_freq + pair, mask=is_rotary, other=0.0)
    sine = tl.where(is_first, -tl.sin(angle), tl.sin(angle))
    return state * tl.cos(angle)[None, :] + partner.to(tl.float32) * sine[None, :]


@triton.jit
def _attend(queries, key_block, value_block, is_visible, peak, total, mixed, SCALE: tl.constexpr):
    """Add a block of keys to a running softmax ``(heads,)``; exponentials have base 2."""
    scores = tl.dot(queries, tl.trans(key_block), input_precision="ieee") * SCALE
    scores = tl.where(is_visible[None, :], scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key was visible so far
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    mixed = mixed * rescale[:, None] + tl.dot(weights.to(value_block.dtype), value_block, input_precision="ieee")
    return new_peak, total * rescale + tl.sum(weights, axis=1), mixed


@triton.jit
def _attend_kept(
    turned, kept_keys, values, num_visible, dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_KEPT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the kept keys to a running softmax, with queries rotated for them."""
    for start in range(0, NUM_KEPT, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        is_visible = slots < num_visible
        offsets, mask = slots[:, None] * DIM + dims[None, :], is_visible[:, None] & has_dim[None, :]
        key_block = tl.load(kept_keys + offsets, mask=mask, other=0.0)
        value_block = tl.load(values + offsets, mask=mask, other=0.0)
        peak, total, mixed = _attend(turned, key_block, value_block, is_visible, peak, total, mixed, SCALE)
    return peak, total, mixed


@triton.jit
def _attend_band(
    queries, keys, values, first_slot, num_filled, new_slot, dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_SLOTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a part of the ring to a running softmax, without the slot that is being written."""
    for block in range(NUM_BLOCKS):
        slots = first_slot + block * BLOCK + tl.arange(0, BLOCK)
        offsets, mask = slots[:, None] * DIM + dims[None, :], (slots < NUM_SLOTS)[:, None] & has_dim[None, :]
        key_block = tl.load(keys + offsets, mask=mask, other=0.0)
        value_block = tl.load(values + offsets, mask=mask, other=0.0)
        is_visible = (slots < num_filled) & (slots != new_slot)
        peak, total, mixed = _attend(queries, key_block, value_block, is_visible, peak, total, mixed, SCALE)
    return peak, total, mixed


@triton.jit
def _merge_parts(
    row_group, parts, part_lse, out, lse, dims, has_dim,
    HEADS: tl.constexpr, DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a group of heads. The last program of the group to finish calls this."""
    splits = tl.arange(0, BLOCK_SPLITS)
    is_split = splits < NUM_SPLITS
    for head in range(HEADS):
        head_parts = (row_group * HEADS + head) * NUM_SPLITS + splits
        head_lse = tl.load(part_lse + head_parts, mask=is_split, other=-float("inf"), cache_modifier=".cg")
        head_mixed = tl.load(
            parts + head_parts[:, None] * DIM + dims[None, :],
            mask=is_split[:, None] & has_dim[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        top = tl.max(head_lse, axis=0)
        weights = tl.exp2(head_lse - top)
        weight_sum = tl.sum(weights, axis=0)
        result = tl.sum(weights[:, None] * head_mixed, axis=0) / weight_sum
        tl.store(out + (row_group * HEADS + head) * DIM + dims, result.to(out.dtype.element_ty), mask=has_dim)
        tl.store(lse + row_group * HEADS + head, (top + tl.log2(weight_sum)) / LOG2E)


@triton.jit
def _decode_kernel(
    query, key, value,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    keys, values, kept_keys, num_arrived, num_seen, base, inv_freq, parts, part_lse, out, lse,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEPT: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program per group of heads, row and split: the new and the kept keys, or slots."""
    SCALE: tl.constexpr = SCALING * LOG2E
    NUM_SLOTS: tl.constexpr = NUM_KEPT + WINDOW + 1
    row_group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    dims, heads = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HEADS)
    has_dim, has_head = dims < DIM, heads < HEADS
    head_mask = has_head[:, None] & has_dim[None, :]
    query += row * query_row_stride + group * HEADS * query_head_stride
    keys, values = keys + row_group * NUM_SLOTS * DIM, values + row_group * NUM_SLOTS * DIM

    token = tl.load(num_seen + row)
    new_slot = tl.where(token < NUM_KEPT, token, NUM_KEPT + (token - NUM_KEPT) % (WINDOW + 1))
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
        own = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1)
        peak, total = own * SCALE, total + 1.0
        mixed += new_value.to(tl.float32)[None, :]
        if NUM_KEPT > 0:
            steps = tl.minimum(token, NUM_KEPT + WINDOW) - (token - tl.load(base + row))
            turned = _turned(
                query, query_head_stride, heads, has_head, inv_freq, steps, DIM, dims, HALF_ROTARY, INTERLEAVED
            )
            peak, total, mixed = _attend_kept(
                turned.to(queries.dtype), kept_keys, values, tl.minimum(token, NUM_KEPT), dims, has_dim,
                peak, total, mixed, SCALE, NUM_KEPT, DIM, BLOCK_KEPT,
            )  # fmt: skip
    else:
        peak, total, mixed = _attend_band(
            queries, keys, values, NUM_KEPT + (split - 1) * BLOCKS_PER_SPLIT * BLOCK, tl.minimum(token, NUM_SLOTS),
            new_slot, dims, has_dim, peak, total, mixed, SCALE, NUM_SLOTS, DIM, BLOCK, BLOCKS_PER_SPLIT,
        )  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    rows = (row_group * HEADS + heads) * NUM_SPLITS + split
    tl.store(part_lse + rows, peak + tl.log2(safe_total), mask=has_head)
    tl.store(parts + rows[:, None] * DIM + dims[None, :], mixed / safe_total[:, None], mask=head_mask)
    tl.debug_barrier()  # write all of this program's part before counting it
    if tl.atomic_add(num_arrived + row_group, 1, sem="acq_rel") == NUM_SPLITS - 1:
        tl.store(num_arrived + row_group, 0)
        _merge_parts(row_group, parts, part_lse, out, lse, dims, has_dim, HEADS, DIM, NUM_SPLITS, BLOCK_SPLITS)
