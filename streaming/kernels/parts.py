"""Parts of the attention kernels of a decoding step.

The slots are split between programs (Flash-Decoding, Dao et al. 2023), so that a single stream uses
the whole GPU. Each program computes a softmax over its part. The last program of a group of heads
to finish merges the parts. Instead of rotating the kept keys for every token, the kernels score
them with a rotated query.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..encodings import Rotary

PROGRAMS_PER_PROCESSOR = 2  # enough to saturate the memory bandwidth
MAX_SPLITS = 32  # a power of 2, all loaded at once by the merging program
MIN_TILE = 16  # minimum size of a matrix product on tensor cores
LOG2E = tl.constexpr(1.4426950408889634)


def num_programs(device: torch.device) -> int:
    """Return the number of programs that fills the device."""
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class Launch:
    """Grid, outputs and constants of a decoding step's attention.

    Args:
        query: ``(B, H, D)``.
        num_groups: G.
        num_slots: slots that are split between programs.
        block: slots that a program processes at a time.
        num_first: programs of a group of heads that process other keys, before those of the slots.
        num_memory_keys: keys of a memory, which are split between the last programs.
    """

    def __init__(
        self, query: Tensor, num_groups: int, num_slots: int, block: int, num_first: int, num_memory_keys: int = 0
    ):
        batch_size, num_heads, head_dim = query.shape
        num_blocks, num_memory_blocks = triton.cdiv(num_slots, block), triton.cdiv(num_memory_keys, block)
        num_all = num_blocks + num_memory_blocks
        wanted = max(1, num_programs(query.device) // (batch_size * num_groups))
        most = MAX_SPLITS - num_first - (num_memory_keys > 0)  # both numbers of splits are rounded up
        blocks_per_split = triton.cdiv(num_all, min(num_all, wanted, most))
        self.num_memory_splits = triton.cdiv(num_memory_blocks, blocks_per_split)
        num_splits = num_first + triton.cdiv(num_blocks, blocks_per_split) + self.num_memory_splits
        self.grid = batch_size * num_groups, num_splits
        self.parts = query.new_empty((batch_size * num_heads, num_splits, head_dim), dtype=torch.float32)
        self.part_lse = query.new_empty((batch_size * num_heads, num_splits), dtype=torch.float32)
        self.out = query.new_empty(query.shape)
        self.lse = query.new_empty((batch_size, num_heads), dtype=torch.float32)
        self.constants: dict[str, Any] = {
            "NUM_GROUPS": num_groups,
            "HEADS": num_heads // num_groups,
            "BLOCK_HEADS": max(MIN_TILE, triton.next_power_of_2(num_heads // num_groups)),
            "DIM": head_dim,
            "BLOCK_DIM": block_of_dims(head_dim),
            "BLOCK": block,
            "BLOCK_KEPT": MIN_TILE,
            "BLOCKS_PER_SPLIT": blocks_per_split,
            "NUM_SPLITS": num_splits,
            "BLOCK_SPLITS": triton.next_power_of_2(num_splits),
        }


def frequencies(encoding: Rotary, like: Tensor, has_positions: bool) -> Tensor:
    """Return a layer's frequencies on the device of its states; zeros if it has no positions."""
    inv_freq = encoding.inv_freq().to(like.device, torch.float32)
    return inv_freq if has_positions else torch.zeros_like(inv_freq)


def block_of_dims(head_dim: int) -> int:
    return max(MIN_TILE, triton.next_power_of_2(head_dim))


def with_strides(*states: Tensor) -> tuple[Any, ...]:
    """Return states ``(B, heads, D)``, dense in the last dimension, then their other strides."""
    states = tuple(state if state.stride(-1) == 1 else state.contiguous() for state in states)
    return *states, *(stride for state in states for stride in state.stride()[:2])


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
def _attend(
    queries, key_block, value_block, is_visible, peak, total, mixed, SCALE: tl.constexpr,
    key_scale=None, value_scale=None,
):  # fmt: skip
    """Add a block of keys to a running softmax ``(heads,)``; exponentials have base 2.

    Args:
        key_scale, value_scale: ``(slots,)``, factors of the keys and values, or None.
    """
    scores = tl.dot(queries, tl.trans(key_block), input_precision="ieee") * SCALE
    if key_scale is not None:
        scores *= key_scale[None, :]
    scores = tl.where(is_visible[None, :], scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key was visible so far
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(weights, axis=1)
    if value_scale is not None:
        weights *= value_scale[None, :]
    mixed = mixed * rescale[:, None] + tl.dot(weights.to(value_block.dtype), value_block, input_precision="ieee")
    return new_peak, total, mixed


@triton.jit
def _attend_band(
    queries, keys, values, first_slot, num_filled, new_slot, dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_SLOTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add consecutive slots to a running softmax, without ``new_slot``, which can be -1: none."""
    for block in range(NUM_BLOCKS):
        slots = first_slot + block * BLOCK + tl.arange(0, BLOCK)
        offsets, mask = slots[:, None] * DIM + dims[None, :], (slots < NUM_SLOTS)[:, None] & has_dim[None, :]
        key_block = tl.load(keys + offsets, mask=mask, other=0.0)
        value_block = tl.load(values + offsets, mask=mask, other=0.0)
        is_visible = (slots < num_filled) & (slots != new_slot)
        peak, total, mixed = _attend(queries, key_block, value_block, is_visible, peak, total, mixed, SCALE)
    return peak, total, mixed


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
def _attend_new(
    query, query_head_stride, heads, has_head, queries, new_key, new_value, kept_keys, kept_values,
    token, num_before, inv_freq, dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, DIM: tl.constexpr,
    HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_KEPT: tl.constexpr,
):  # fmt: skip
    """Start a running softmax with the new key and the kept ones.

    Args:
        num_before: phase of the new token.
    """
    own = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1)
    peak, total = own * SCALE, total + 1.0
    mixed += new_value.to(tl.float32)[None, :]
    if NUM_KEPT > 0:
        steps = tl.minimum(token, NUM_KEPT + WINDOW) - num_before
        turned = _turned(
            query, query_head_stride, heads, has_head, inv_freq, steps, DIM, dims, HALF_ROTARY, INTERLEAVED
        )
        peak, total, mixed = _attend_kept(
            turned.to(queries.dtype), kept_keys, kept_values, tl.minimum(token, NUM_KEPT), dims, has_dim,
            peak, total, mixed, SCALE, NUM_KEPT, DIM, BLOCK_KEPT,
        )  # fmt: skip
    return peak, total, mixed


@triton.jit
def _finish(
    row_group, split, heads, has_head, dims, has_dim, peak, total, mixed, num_arrived, parts, part_lse, out, lse,
    HEADS: tl.constexpr, DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Store this program's part. The last program of a group of heads merges all parts."""
    safe_total = tl.where(total == 0.0, 1.0, total)
    rows = (row_group * HEADS + heads) * NUM_SPLITS + split
    tl.store(part_lse + rows, peak + tl.log2(safe_total), mask=has_head)
    mask = has_head[:, None] & has_dim[None, :]
    tl.store(parts + rows[:, None] * DIM + dims[None, :], mixed / safe_total[:, None], mask=mask)
    tl.debug_barrier()  # write all of this program's part before counting it
    if tl.atomic_add(num_arrived + row_group, 1, sem="acq_rel") == NUM_SPLITS - 1:
        tl.store(num_arrived + row_group, 0)
        _merge_parts(row_group, parts, part_lse, out, lse, dims, has_dim, HEADS, DIM, NUM_SPLITS, BLOCK_SPLITS)


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
        top = tl.where(top == -float("inf"), 0.0, top)  # no key is visible
        weights = tl.exp2(head_lse - top)
        weight_sum = tl.sum(weights, axis=0)
        result = tl.sum(weights[:, None] * head_mixed, axis=0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
        tl.store(out + (row_group * HEADS + head) * DIM + dims, result.to(out.dtype.element_ty), mask=has_dim)
        tl.store(lse + row_group * HEADS + head, (top + tl.log2(weight_sum)) / LOG2E)
