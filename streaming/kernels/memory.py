"""The blocks of a memory: choose them, copy them from host memory, and attend to them."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parts import LOG2E, MIN_TILE, _attend_band, _turned, block_of_dims

WORD = torch.int64
COPIED = 1024  # words that a program copies
SCORED = 64  # representative keys that a program scores at a time
SCORE_SPLITS = 16  # programs among which the blocks of a group of heads are divided
CHOSEN_FROM = 128  # blocks whose weights a program computes at a time


class Recall:
    """Chooses the blocks of a memory and copies them to the device, without the host.

    A captured graph can include it: it finds what grows with the stream, the blocks in host memory
    and the scores of the blocks, by addresses on the device.

    Args:
        keys, values: of the chosen blocks, ``(B, G, num_blocks * block_size, D)``.
        num_rows: B * G * num_blocks.
        num_queries: queries of a row that choose, ``H * interval``.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_rows: int, num_queries: int):
        self.targets, self.num_rows, self.num_queries = (keys, values), num_rows, num_queries
        self.sources: tuple[Tensor, ...] = ()
        self.addresses = torch.zeros(8, dtype=torch.int64, device=keys.device)
        self.rows = torch.zeros(2 * num_rows, dtype=torch.int64, device=keys.device)  # of keys, then of values

    def reads(self, buffers: Sequence[Tensor]) -> bool:
        """Whether these are the blocks that it uses."""
        return all(mine is theirs for mine, theirs in zip(self.sources, buffers, strict=False)) and bool(self.sources)

    def read_from(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        """Use these blocks, see `HostBlocks`. Call this again when one of them is another tensor.

        Args:
            keys, values, index: as the device reads them, with all rows that are allocated.
        """
        batch_size, num_groups = keys.shape[1:3]
        scores = torch.empty(batch_size * self.num_queries * len(keys), device=self.rows.device)
        weights = torch.empty(batch_size * num_groups * len(keys), device=self.rows.device)
        self.sources = keys, values, index, scores, weights
        used = (keys, values, *self.targets, index, scores, weights)
        addresses = torch.tensor([*(each.data_ptr() for each in used), len(keys)])
        self.addresses.copy_(addresses)

    def __call__(
        self,
        query: Tensor,
        queries: Tensor,
        kept_keys: Tensor,
        num_chosen: Tensor,
        num_seen: Tensor,
        base: Tensor,
        inv_freq: Tensor,
        *,
        num_kept: int,
        window: int,
        block_size: int,
        representative_size: int,
        interleaved: bool,
        scaling: float,
        newer: float,
    ) -> None:
        """Choose the blocks of an interval that begins with the new token, and copy them.

        Args:
            query: of the new token, ``(B, H, D)``.
            queries: see `LayerMemory`; the new one is stored.
            kept_keys: ``(B, G, num_kept + 1, D)``.
        """
        batch_size, num_heads, head_dim = query.shape
        num_groups, interval = kept_keys.shape[1], queries.shape[2] - 1
        num_representatives = block_size // representative_size
        num_blocks = self.num_rows // (batch_size * num_groups)
        tile = triton.next_power_of_2(num_representatives)
        constants: dict[str, Any] = {
            "SCALING": scaling,
            "NUM_KEPT": num_kept,
            "WINDOW": window,
            "BLOCK_SIZE": block_size,
            "INTERVAL": interval,
            "NUM_GROUPS": num_groups,
            "HEADS": num_heads // num_groups,
            "BLOCK_QUERIES": max(MIN_TILE, triton.next_power_of_2(num_heads // num_groups * interval)),
            "DIM": head_dim,
            "BLOCK_DIM": block_of_dims(head_dim),
            "HALF_ROTARY": inv_freq.shape[0],
            "INTERLEAVED": interleaved,
        }
        streams = (queries, num_seen, self.addresses)
        query = query if query.stride(-1) == 1 else query.contiguous()
        num_programs = batch_size * num_groups
        like = self.targets[0].flatten()
        if like.nbytes // self.num_rows % WORD.itemsize == 0:
            like = like.view(WORD)  # the kernel loads whole words
        size = len(like) // self.num_rows
        with torch.cuda.device_of(query):
            _score_kernel[num_programs, SCORE_SPLITS](
                query, *query.stride()[:2], base, inv_freq, *streams,
                REPRESENTATIVES=num_representatives, BLOCK_REPRESENTATIVES=tile, BLOCKS=max(1, SCORED // tile),
                SPLITS=SCORE_SPLITS, **constants, num_warps=4,
            )  # fmt: skip
            _choose_kernel[num_programs,](
                kept_keys, inv_freq, *streams, self.rows, num_chosen, self.num_rows,
                NUM_BLOCKS=num_blocks, BLOCK=CHOSEN_FROM, BLOCK_KEPT=MIN_TILE, NEWER=newer, **constants, num_warps=4,
            )  # fmt: skip
            _copy_kernel[2 * self.num_rows, triton.cdiv(size, COPIED)](
                like, self.addresses, self.rows, self.num_rows, SIZE=size, BLOCK=COPIED, num_warps=4
            )


@triton.jit
def _score_kernel(
    query, query_row_stride, query_head_stride, base, inv_freq, queries, num_seen, addresses,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERVAL: tl.constexpr, NUM_GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    REPRESENTATIVES: tl.constexpr, BLOCK_REPRESENTATIVES: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Score blocks for the last queries. A program per group of heads, row and part of the blocks.

    The first program of a group stores the new query.
    """
    row_group, split, num_programs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    token, dims, each = tl.load(num_seen + row), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_QUERIES)
    head, age, has_dim, has_query = each // INTERVAL, each % INTERVAL, dims < DIM, each < HEADS * INTERVAL
    mask = has_query[:, None] & has_dim[None, :]
    query += row * query_row_stride + group * HEADS * query_head_stride
    turned = _turned(
        query, query_head_stride, head, has_query, inv_freq, WINDOW + BLOCK_SIZE - (token - tl.load(base + row)),
        DIM, dims, HALF_ROTARY, INTERLEAVED,
    )  # fmt: skip
    kind = queries.dtype.element_ty
    new = (turned.to(kind).to(tl.float32) * SCALING).to(kind)
    rows = (row_group * HEADS + head) * (INTERVAL + 1) + (token - age) % (INTERVAL + 1)
    places = queries + rows[:, None] * DIM + dims[None, :]
    if split == 0:
        tl.store(places, new, mask=mask & (age == 0)[:, None])
    states = tl.where((age == 0)[:, None], new, tl.load(places, mask=mask & (age > 0)[:, None], other=0.0))

    index = tl.load(addresses + 4).to(tl.pointer_type(kind))
    scores, capacity = tl.load(addresses + 5).to(tl.pointer_type(tl.float32)), tl.load(addresses + 7)
    num_evicted = tl.maximum(token - NUM_KEPT - WINDOW, 0) // BLOCK_SIZE
    place = tl.arange(0, BLOCKS * BLOCK_REPRESENTATIVES)
    part, representative = place // BLOCK_REPRESENTATIVES, place % BLOCK_REPRESENTATIVES
    for start in range(split * BLOCKS, num_evicted, SPLITS * BLOCKS):
        is_key = (start + part < num_evicted) & (representative < REPRESENTATIVES)
        keys = ((start + part) * num_programs + row_group) * REPRESENTATIVES + representative
        means = tl.load(index + keys[:, None] * DIM + dims[None, :], mask=is_key[:, None] & has_dim[None, :], other=0.0)
        found = tl.dot(states, tl.trans(means), input_precision="ieee")
        found = tl.where(is_key[None, :], found, -float("inf"))
        best = tl.max(tl.reshape(found, (BLOCK_QUERIES, BLOCKS, BLOCK_REPRESENTATIVES)), axis=2)
        blocks = start + tl.arange(0, BLOCKS)
        tl.store(
            scores + (row_group * HEADS * INTERVAL + each)[:, None] * capacity + blocks[None, :],
            best,
            mask=has_query[:, None] & (blocks < num_evicted)[None, :],
        )


@triton.jit
def _choose_kernel(
    kept_keys, inv_freq, queries, num_seen, addresses, rows, num_chosen, num_rows,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERVAL: tl.constexpr, NUM_GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEPT: tl.constexpr, NEWER: tl.constexpr,
):  # fmt: skip
    """Choose the blocks of the largest weights, see `LayerMemory.weights`.

    A program per group of heads and row.
    """
    row_group, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    token = tl.load(num_seen + row_group // NUM_GROUPS)
    each, dims, columns = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK)
    head, has_query, has_dim = each // INTERVAL, each < HEADS * INTERVAL, dims < DIM
    scores = tl.load(addresses + 5).to(tl.pointer_type(tl.float32))
    weights, capacity = tl.load(addresses + 6).to(tl.pointer_type(tl.float32)), tl.load(addresses + 7)
    scores += (row_group * HEADS * INTERVAL + each)[:, None] * capacity
    weights += row_group * capacity
    num_evicted = tl.maximum(token - NUM_KEPT - WINDOW, 0) // BLOCK_SIZE

    peak, total = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32), tl.zeros([BLOCK_QUERIES], tl.float32)
    if NUM_KEPT > 0:
        places = head * (INTERVAL + 1) + (token - each % INTERVAL) % (INTERVAL + 1)
        turned = _turned(
            queries + row_group * HEADS * (INTERVAL + 1) * DIM, DIM, places, has_query, inv_freq,
            token * 0 + NUM_KEPT - BLOCK_SIZE, DIM, dims, HALF_ROTARY, INTERLEAVED,
        ).to(queries.dtype.element_ty)  # fmt: skip
        for start in range(0, NUM_KEPT, BLOCK_KEPT):
            slots = start + tl.arange(0, BLOCK_KEPT)
            keys = tl.load(
                kept_keys + (row_group * (NUM_KEPT + 1) + slots)[:, None] * DIM + dims[None, :],
                mask=(slots < NUM_KEPT)[:, None] & has_dim[None, :], other=0.0,
            )  # fmt: skip
            found = tl.dot(turned, tl.trans(keys), input_precision="ieee")
            peak, total = _add_scores(tl.where((slots < NUM_KEPT)[None, :], found, -float("inf")), peak, total)
    for start in range(0, num_evicted, BLOCK):
        is_block = start + columns < num_evicted
        mask = has_query[:, None] & is_block[None, :]
        found = tl.load(scores + (start + columns)[None, :], mask=mask, other=-float("inf"))
        peak, total = _add_scores(found, peak, total)
    peak, total = tl.where(has_query, peak, 0.0), tl.where(has_query, total, 1.0)
    for start in range(0, num_evicted, BLOCK):
        is_block = start + columns < num_evicted
        mask = has_query[:, None] & is_block[None, :]
        found = tl.load(scores + (start + columns)[None, :], mask=mask, other=-float("inf"))
        shares = tl.exp(found - peak[:, None]) / total[:, None]
        newer = 1.0 + NEWER * (start + columns).to(tl.float32)
        tl.store(weights + start + columns, tl.sum(shares, axis=0) * newer, mask=is_block)
    tl.debug_barrier()  # all weights are written before they are read
    if row_group == 0:
        tl.store(num_chosen, tl.minimum(num_evicted, NUM_BLOCKS))
    for i in range(NUM_BLOCKS):
        best, block = tl.full([], -1.0, tl.float32), tl.zeros([], tl.int64)
        for start in range(0, num_evicted, BLOCK):
            found = tl.load(weights + start + columns, mask=start + columns < num_evicted, other=-1.0)
            top, place = tl.max(found, axis=0, return_indices=True)
            block = tl.where(top > best, start + place, block)
            best = tl.maximum(best, top)
        tl.debug_barrier()  # all have read the weights before one changes
        tl.store(weights + block, -1.0)
        tl.debug_barrier()
        row = block * num_programs + row_group
        tl.store(rows + row_group * NUM_BLOCKS + i, row)
        tl.store(rows + num_rows + row_group * NUM_BLOCKS + i, row)


@triton.jit
def _add_scores(found, peak, total):
    """Add scores ``(queries, columns)`` to a running log-sum-exp."""
    new_peak = tl.maximum(peak, tl.max(found, axis=1))
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    return new_peak, total * tl.exp(peak - shift) + tl.sum(tl.exp(found - shift[:, None]), axis=1)


@triton.jit
def _copy_kernel(like, addresses, rows, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy blocks of keys, then of values. A program per row and part of it.

    Args:
        like: a tensor of the type of the words.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    which = row // num_rows
    source = tl.load(addresses + which).to(tl.pointer_type(like.dtype.element_ty)) + tl.load(rows + row) * SIZE
    target = tl.load(addresses + 2 + which).to(tl.pointer_type(like.dtype.element_ty)) + row % num_rows * SIZE
    offsets = part * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < SIZE), mask=offsets < SIZE)


@triton.jit
def _attend_memory(
    query, query_head_stride, heads, has_head, keys, values, num_chosen, last_queries,
    row_group, split, token, num_before, inv_freq, dims, has_dim, peak, total, mixed,
    SCALING: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF_ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_SPLIT: tl.constexpr,
):  # fmt: skip
    """Add a split of the chosen blocks to a running softmax. The first one stores the queries.

    Args:
        split: counted from the first one of the memory.
        num_before: phase of the new token.
    """
    turned = _turned(
        query, query_head_stride, heads, has_head, inv_freq, WINDOW + BLOCK_SIZE - num_before,
        DIM, dims, HALF_ROTARY, INTERLEAVED,
    )  # fmt: skip
    queries = turned.to(last_queries.dtype.element_ty)
    if split == 0:
        rows = (row_group * HEADS + heads) * NUM_QUERIES + token % NUM_QUERIES
        scaled = (queries.to(tl.float32) * SCALING).to(queries.dtype)
        tl.store(last_queries + rows[:, None] * DIM + dims[None, :], scaled, mask=has_head[:, None] & has_dim[None, :])
    keys, values = keys + row_group * NUM_KEYS * DIM, values + row_group * NUM_KEYS * DIM
    return _attend_band(
        queries, keys, values, split * BLOCKS_PER_SPLIT * BLOCK, tl.load(num_chosen) * BLOCK_SIZE, -1,  # no new slot
        dims, has_dim, peak, total, mixed, SCALING * LOG2E, NUM_KEYS, DIM, BLOCK, BLOCKS_PER_SPLIT,
    )  # fmt: skip
