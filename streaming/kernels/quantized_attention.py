"""Attention of one new token over keys and values with 8 or 4 bits, in one kernel.

The kernel quantizes the new key and value and stores them. The window is read as codes; the kept
tokens and the most recent ones are read in full precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from . import parts
from .parts import LOG2E, MAX_SPLITS, MIN_TILE, Launch, _attend, _attend_new, _finish, block_of_dims, with_strides

BLOCK_BYTES = 16384  # keys that a program processes at a time, in bytes of the dtype of the query
MIN_BLOCK = 32  # slots
NUM_FIRST = 2  # programs of a group of heads: for the new key and the kept keys, and for the recent ones
INT4_GROUP = 32  # dimensions
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and subtracted, rounds float32 to integers, halves to even


@custom_op(
    "sinklm::decode_quantized_attention",
    mutates_args=(
        *("key_codes", "value_codes", "key_scales", "value_scales"),
        *("recent_keys", "recent_values", "kept_keys", "kept_values", "num_arrived"),
    ),
)
def decode_quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    num_arrived: Tensor,
    num_seen: Tensor,
    base: Tensor,
    inv_freq: Tensor,
    num_kept: int,
    window: int,
    interleaved: bool,
    scaling: float,
    num_recent: int,
) -> tuple[Tensor, Tensor]:
    """See `decode_attention`; the buffers are those of a `QuantizedLayer`."""
    block_dim = block_of_dims(query.shape[-1])
    block = block_of_slots(query, key.shape[1], window + 1)
    launch = Launch(query, key.shape[1], window + 1, block, NUM_FIRST)
    num_bits = 8 if key_codes.dtype == torch.int8 else 4
    has_groups = num_bits == 4 and query.shape[-1] % INT4_GROUP == 0
    with torch.cuda.device_of(query):
        _decode_quantized_kernel[launch.grid](
            *with_strides(query, key, value),
            *(key_codes, value_codes, key_scales, value_scales, recent_keys, recent_values, kept_keys, kept_values),
            *(num_arrived, num_seen, base, inv_freq, launch.parts, launch.part_lse, launch.out, launch.lse),
            SCALING=scaling,
            NUM_KEPT=num_kept,
            WINDOW=window,
            NUM_RECENT=num_recent,
            BITS=num_bits,
            GROUP_DIM=INT4_GROUP if has_groups else block_dim,
            BLOCK_RECENT=max(MIN_TILE, triton.next_power_of_2(num_recent)),
            HALF_ROTARY=inv_freq.shape[0],
            INTERLEAVED=interleaved,
            **launch.constants,
            num_warps=4,
            num_stages=3,
        )
    return launch.out, launch.lse


def block_of_slots(query: Tensor, num_groups: int, num_slots: int) -> int:
    """Return how many slots a program processes at a time: fewer if the GPU would not be full."""
    block = max(MIN_TILE, BLOCK_BYTES // (query.element_size() * block_of_dims(query.shape[-1])))
    wanted = parts.num_programs(query.device) // (query.shape[0] * num_groups)
    wanted = min(wanted, MAX_SPLITS - NUM_FIRST)
    while block > MIN_BLOCK and triton.cdiv(num_slots, block // 2) <= wanted:
        block //= 2
    return block


@decode_quantized_attention.register_fake
def _(query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@triton.jit
def _rounded(states):
    return (states + ROUNDER) - ROUNDER


@triton.jit
def _store_quantized(
    state, codes, scales, slot, dims, has_dim,
    BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr,
):  # fmt: skip
    """Quantize a key or value ``(dims,)`` as `Int8` and `Int4` do, and store it in a slot."""
    state = state.to(tl.float32)
    if BITS == 8:
        scale = (tl.max(tl.abs(state), axis=0) * (1 / 127)).to(tl.bfloat16)
        tl.store(scales + slot, scale)
        code = _rounded(tl.div_rn(state, tl.maximum(scale.to(tl.float32), TINY)))
        tl.store(codes + slot * DIM + dims, tl.clamp(code, -127.0, 127.0).to(tl.int8), mask=has_dim)
    else:
        HALF: tl.constexpr = DIM // 2
        NUM_GROUPS: tl.constexpr = (DIM + GROUP_DIM - 1) // GROUP_DIM
        shape: tl.constexpr = [BLOCK_DIM // GROUP_DIM, GROUP_DIM]
        groups = tl.arange(0, BLOCK_DIM // GROUP_DIM)
        low = tl.min(tl.reshape(tl.where(has_dim, state, float("inf")), shape), axis=1)
        high = tl.max(tl.reshape(tl.where(has_dim, state, -float("inf")), shape), axis=1)
        low = tl.where(groups < NUM_GROUPS, low, 0.0).to(tl.bfloat16)
        scale = ((tl.where(groups < NUM_GROUPS, high, 0.0) - low.to(tl.float32)) * (1 / 15)).to(tl.bfloat16)
        scales += slot * 2 * NUM_GROUPS + 2 * groups
        tl.store(scales, scale, mask=groups < NUM_GROUPS)
        tl.store(scales + 1, low, mask=groups < NUM_GROUPS)
        steps = tl.reshape(state, shape) - low.to(tl.float32)[:, None]
        code = _rounded(tl.div_rn(steps, tl.maximum(scale.to(tl.float32), TINY)[:, None]))
        code = tl.reshape(tl.clamp(code, 0.0, 15.0).to(tl.int32), [BLOCK_DIM])
        upper = tl.gather(code, tl.minimum(dims + HALF, BLOCK_DIM - 1), axis=0)
        tl.store(codes + slot * HALF + dims, (code | (upper << 4)).to(tl.uint8), mask=dims < HALF)


@triton.jit
def _load_codes(
    codes, slots, dims, has_dim,
    BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return codes ``(slots, groups, dims of a group)`` in float32, divided by `_units`."""
    if BITS == 8:
        code = tl.load(codes + slots[:, None] * DIM + dims[None, :], mask=has_dim[None, :], other=0)
    else:
        HALF: tl.constexpr = DIM // 2
        pairs = tl.load(codes + slots[:, None] * HALF + (dims % HALF)[None, :], mask=has_dim[None, :], other=0)
        code = pairs & tl.where(dims < HALF, 0x0F, 0xF0).to(tl.uint8)[None, :]
    return tl.reshape(code, [BLOCK, BLOCK_DIM // GROUP_DIM, GROUP_DIM]).to(tl.float32)


@triton.jit
def _units(dims, BITS: tl.constexpr, DIM: tl.constexpr):
    """Return factors ``(dims,)`` of the codes: 4 bit ones are not shifted, to save time."""
    return tl.where((BITS == 8) | (dims < DIM // 2), 1.0, 1.0 / 16.0)


@triton.jit
def _load_scales(
    scales, slots, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr,
):  # fmt: skip
    """Return the scales and smallest values ``(slots, groups)``."""
    if BITS == 8:
        scale = tl.load(scales + slots).to(tl.float32)[:, None]
        low = tl.zeros_like(scale)
    else:
        NUM_GROUPS: tl.constexpr = (DIM + GROUP_DIM - 1) // GROUP_DIM
        groups = tl.arange(0, BLOCK_DIM // GROUP_DIM)
        places = scales + slots[:, None] * 2 * NUM_GROUPS + 2 * groups[None, :]
        scale = tl.load(places, mask=(groups < NUM_GROUPS)[None, :], other=0.0).to(tl.float32)
        low = tl.load(places + 1, mask=(groups < NUM_GROUPS)[None, :], other=0.0).to(tl.float32)
    return scale, low


@triton.jit
def _dequantized(
    codes, scales, slots, dims, has_dim,
    BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return keys or values ``(slots, dims)`` in float32."""
    code = _load_codes(codes, slots, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK)
    code *= tl.reshape(_units(dims, BITS, DIM), [1, BLOCK_DIM // GROUP_DIM, GROUP_DIM])
    scale, low = _load_scales(scales, slots, BITS, DIM, BLOCK_DIM, GROUP_DIM)
    return tl.reshape(code * scale[:, :, None] + low[:, :, None], [BLOCK, BLOCK_DIM])


@triton.jit
def _is_in_codes(slots, num_filled, new_slot, NUM_SLOTS: tl.constexpr, NUM_RECENT: tl.constexpr):
    """Which slots are read from the ring: not the new token's, nor those of recent tokens."""
    age = new_slot - slots
    age = tl.where(age < 0, age + NUM_SLOTS, age)
    return (slots < num_filled) & (age > NUM_RECENT)


@triton.jit
def _attend_codes(
    queries, key_codes, value_codes, key_scales, value_scales, first_slot, num_filled, new_slot,
    dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_SLOTS: tl.constexpr, NUM_RECENT: tl.constexpr, BITS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Add a part of the ring to a running softmax, on tensor cores."""
    for block in range(NUM_BLOCKS):
        slots = first_slot + block * BLOCK + tl.arange(0, BLOCK)
        is_visible = _is_in_codes(slots, num_filled, new_slot, NUM_SLOTS, NUM_RECENT)
        slots = tl.minimum(slots, NUM_SLOTS - 1)
        if BITS == 8:
            offsets = slots[:, None] * DIM + dims[None, :]
            key_block = tl.load(key_codes + offsets, mask=has_dim[None, :], other=0).to(queries.dtype)
            # Weights times scales may be too small for float16.
            VALUE_DTYPE: tl.constexpr = tl.bfloat16 if queries.dtype == tl.float16 else queries.dtype
            value_block = tl.load(value_codes + offsets, mask=has_dim[None, :], other=0).to(VALUE_DTYPE)
            key_scale = tl.load(key_scales + slots).to(tl.float32)
            value_scale = tl.load(value_scales + slots).to(tl.float32)
            peak, total, mixed = _attend(
                queries, key_block, value_block, is_visible, peak, total, mixed, SCALE, key_scale, value_scale
            )
        else:
            key_block = _dequantized(
                key_codes, key_scales, slots, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK
            ).to(queries.dtype)
            value_block = _dequantized(
                value_codes, value_scales, slots, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK
            ).to(queries.dtype)
            peak, total, mixed = _attend(queries, key_block, value_block, is_visible, peak, total, mixed, SCALE)
    return peak, total, mixed


@triton.jit
def _attend_codes_of_one_head(
    query, key_codes, value_codes, key_scales, value_scales, first_slot, num_filled, new_slot, dims, has_dim,
    SCALE: tl.constexpr, NUM_SLOTS: tl.constexpr, NUM_RECENT: tl.constexpr, BITS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the softmax of a part of the ring for one query ``(dims,)``: peak, total, mixed.

    Tensor cores would need codes in another layout and type. Here threads use them as they are
    loaded. Each row of a block has a running softmax of its own; they are merged at the end.
    """
    shape: tl.constexpr = [BLOCK_DIM // GROUP_DIM, GROUP_DIM]
    units = tl.reshape(_units(dims, BITS, DIM), shape)
    query = tl.reshape(query, shape)
    query_sum, query = tl.sum(query, axis=1), query * units
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, BLOCK_DIM // GROUP_DIM, GROUP_DIM], tl.float32)
    mixed_low = tl.zeros([BLOCK, BLOCK_DIM // GROUP_DIM], tl.float32)
    for block in tl.range(0, NUM_BLOCKS, num_stages=3):
        slots = first_slot + block * BLOCK + tl.arange(0, BLOCK)
        is_visible = _is_in_codes(slots, num_filled, new_slot, NUM_SLOTS, NUM_RECENT)
        slots = tl.minimum(slots, NUM_SLOTS - 1)
        key_code = _load_codes(key_codes, slots, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK)
        value_code = _load_codes(value_codes, slots, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK)
        key_scale, key_low = _load_scales(key_scales, slots, BITS, DIM, BLOCK_DIM, GROUP_DIM)
        value_scale, value_low = _load_scales(value_scales, slots, BITS, DIM, BLOCK_DIM, GROUP_DIM)

        products = tl.sum(key_code * query[None, :, :], axis=2)
        scores = SCALE * tl.sum(products * key_scale + query_sum[None, :] * key_low, axis=1)
        scores = tl.where(is_visible, scores, -float("inf"))
        new_peak = tl.maximum(peak, scores)
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights, rescale, peak = tl.exp2(scores - shift), tl.exp2(peak - shift), new_peak
        total = total * rescale + weights
        factors = (weights[:, None] * value_scale)[:, :, None]
        mixed = mixed * rescale[:, None, None] + factors * value_code
        mixed_low = mixed_low * rescale[:, None] + weights[:, None] * value_low
    top = tl.max(peak, axis=0)
    weights = tl.exp2(peak - tl.where(top == -float("inf"), 0.0, top))
    mixed = tl.sum((mixed * units[None, :, :] + mixed_low[:, :, None]) * weights[:, None, None], axis=0)
    return top, tl.sum(total * weights, axis=0), tl.reshape(mixed, [BLOCK_DIM])


@triton.jit
def _attend_recent(
    queries, recent_keys, recent_values, token, dims, has_dim, peak, total, mixed,
    SCALE: tl.constexpr, NUM_KEPT: tl.constexpr, NUM_RECENT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_RECENT: tl.constexpr,
):  # fmt: skip
    """Add the tokens before the new one that are stored in full precision to a running softmax."""
    ages = 1 + tl.arange(0, BLOCK_RECENT)
    tokens = token - ages
    is_visible = (ages <= NUM_RECENT) & (tokens >= NUM_KEPT)
    offsets = (tokens % (NUM_RECENT + 1))[:, None] * DIM + dims[None, :]
    mask = is_visible[:, None] & has_dim[None, :]
    key_block = tl.load(recent_keys + offsets, mask=mask, other=0.0)
    value_block = tl.load(recent_values + offsets, mask=mask, other=0.0)
    return _attend(queries, key_block, value_block, is_visible, peak, total, mixed, SCALE)


@triton.jit
def _store_new(
    state, codes, scales, recent, kept, token, new_slot, dims, has_dim, NUM_KEPT: tl.constexpr,
    NUM_RECENT: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, GROUP_DIM: tl.constexpr,
):  # fmt: skip
    """Store the new key or value ``(dims,)`` in the ring, and as it is."""
    _store_quantized(state, codes, scales, new_slot, dims, has_dim, BITS, DIM, BLOCK_DIM, GROUP_DIM)
    tl.store(recent + (token % (NUM_RECENT + 1)) * DIM + dims, state, mask=has_dim)
    tl.store(kept + tl.minimum(token, NUM_KEPT) * DIM + dims, state, mask=has_dim)


@triton.jit
def _decode_quantized_kernel(
    query, key, value,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    key_codes, value_codes, key_scales, value_scales, recent_keys, recent_values, kept_keys, kept_values,
    num_arrived, num_seen, base, inv_freq, parts, part_lse, out, lse,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, NUM_RECENT: tl.constexpr,
    BITS: tl.constexpr, GROUP_DIM: tl.constexpr, BLOCK_RECENT: tl.constexpr, NUM_GROUPS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEPT: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """A program per group of heads, row and split: new and kept keys, recent ones, or codes."""
    SCALE: tl.constexpr = SCALING * LOG2E
    RING: tl.constexpr = WINDOW + 1
    CODES: tl.constexpr = DIM * BITS // 8
    SCALES: tl.constexpr = 1 if BITS == 8 else 2 * ((DIM + GROUP_DIM - 1) // GROUP_DIM)
    row_group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    dims, heads = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_HEADS)
    has_dim, has_head = dims < DIM, heads < HEADS
    query += row * query_row_stride + group * HEADS * query_head_stride
    key_codes, value_codes = key_codes + row_group * RING * CODES, value_codes + row_group * RING * CODES
    key_scales, value_scales = key_scales + row_group * RING * SCALES, value_scales + row_group * RING * SCALES
    recent_keys += row_group * (NUM_RECENT + 1) * DIM
    recent_values += row_group * (NUM_RECENT + 1) * DIM

    token = tl.load(num_seen + row)
    new_slot = ((token - NUM_KEPT) % RING + RING) % RING
    num_filled = tl.minimum(token - NUM_KEPT, RING).to(tl.int32)
    head_mask = has_head[:, None] & has_dim[None, :]
    queries = tl.load(query + heads[:, None] * query_head_stride + dims[None, :], mask=head_mask, other=0.0)
    peak = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    mixed = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)

    if split == 0:
        new_key = tl.load(key + row * key_row_stride + group * key_head_stride + dims, mask=has_dim, other=0.0)
        new_value = tl.load(value + row * value_row_stride + group * value_head_stride + dims, mask=has_dim, other=0.0)
        kept_keys += row_group * (NUM_KEPT + 1) * DIM
        kept_values += row_group * (NUM_KEPT + 1) * DIM
        _store_new(
            new_key, key_codes, key_scales, recent_keys, kept_keys, token, new_slot, dims, has_dim,
            NUM_KEPT, NUM_RECENT, BITS, DIM, BLOCK_DIM, GROUP_DIM,
        )  # fmt: skip
        _store_new(
            new_value, value_codes, value_scales, recent_values, kept_values, token, new_slot, dims, has_dim,
            NUM_KEPT, NUM_RECENT, BITS, DIM, BLOCK_DIM, GROUP_DIM,
        )  # fmt: skip
        peak, total, mixed = _attend_new(
            query, query_head_stride, heads, has_head, queries, new_key, new_value, kept_keys, kept_values,
            token, token - tl.load(base + row), inv_freq, dims, has_dim, peak, total, mixed,
            SCALE, NUM_KEPT, WINDOW, DIM, HALF_ROTARY, INTERLEAVED, BLOCK_KEPT,
        )  # fmt: skip
    elif split == 1:
        peak, total, mixed = _attend_recent(
            queries, recent_keys, recent_values, token, dims, has_dim, peak, total, mixed,
            SCALE, NUM_KEPT, NUM_RECENT, DIM, BLOCK_RECENT,
        )  # fmt: skip
    elif HEADS == 1:
        one_query = tl.load(query + dims, mask=has_dim, other=0.0).to(tl.float32)
        one_peak, one_total, one_mixed = _attend_codes_of_one_head(
            one_query, key_codes, value_codes, key_scales, value_scales,
            (split - 2) * BLOCKS_PER_SPLIT * BLOCK, num_filled, new_slot.to(tl.int32), dims, has_dim,
            SCALE, RING, NUM_RECENT, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK, BLOCKS_PER_SPLIT,
        )  # fmt: skip
        peak, total, mixed = tl.maximum(peak, one_peak), total + one_total, mixed + one_mixed[None, :]
    else:
        peak, total, mixed = _attend_codes(
            queries, key_codes, value_codes, key_scales, value_scales,
            (split - 2) * BLOCKS_PER_SPLIT * BLOCK, num_filled, new_slot.to(tl.int32), dims, has_dim,
            peak, total, mixed,
            SCALE, RING, NUM_RECENT, BITS, DIM, BLOCK_DIM, GROUP_DIM, BLOCK, BLOCKS_PER_SPLIT,
        )  # fmt: skip
    _finish(
        row_group, split, heads, has_head, dims, has_dim, peak, total, mixed, num_arrived, parts, part_lse, out, lse,
        HEADS, DIM, NUM_SPLITS, BLOCK_SPLITS,
    )  # fmt: skip
