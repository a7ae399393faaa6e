"""The blocks of a memory: choose them, copy them from host memory, and attend to them."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import static_zeros
from ..encodings import Rotary
from ..rule import StreamShape
from .parts import LOG2E, MIN_TILE, _attend_band, _turned, block_of_dims, frequencies

WORD = torch.int64
COPIED = 1024  # words that a program copies
MAX_TILE, TILE_BYTES = 64, 16384  # queries, and representative keys, that a program scores at a time
SCORE_SPLITS = 16  # programs among which the blocks of a group of heads are divided
CHOSEN_FROM = 128  # blocks whose weights a program computes at a time


class BlockChoice:
    """Chooses the blocks of a memory and copies them to the device, without the host.

    A captured graph can include it: it finds what grows with the stream, the blocks in host memory
    and the scores of the blocks, by addresses on the device.

    Args:
        num_rows: chosen blocks of all heads, ``B * G * num_blocks``.
    """

    def __init__(self, num_rows: int, device: torch.device):
        self.sources: tuple[Tensor, ...] = ()
        self.addresses = static_zeros((6,), torch.int64, device)
        self.rows = static_zeros((num_rows,), torch.int64, device)

    @staticmethod
    def num_scores(keys: Tensor, num_queries: int) -> int:
        """Return how many numbers a choice from these blocks needs, see `read_from`."""
        num_blocks, batch_size, num_groups = keys.shape[:3]
        return batch_size * (num_queries + num_groups) * num_blocks

    def read_from(self, blocks: Sequence[Tensor], scores: Tensor) -> None:
        """Use these blocks. Nothing happens if it uses them already.

        Args:
            blocks: keys, values and index of `HostBlocks`, as the device reads them, with all rows
                that are allocated.
            scores: of `num_scores`, in float32; layers that run one after another share them.
        """
        sources = *blocks, scores
        if len(self.sources) == len(sources) and all(map(is_, sources, self.sources)):
            return
        num_weights = blocks[0].shape[:3].numel()
        used = [*(each.data_ptr() for each in sources), scores[num_weights:].data_ptr(), len(blocks[0])]
        self.addresses.copy_(torch.tensor(used, device="cpu"))
        self.sources = sources

    def __call__(
        self,
        query: Tensor,
        kept_keys: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        num_chosen: Tensor,
        num_seen: Tensor,
        base: Tensor,
        *,
        shape: StreamShape,
        encoding: Rotary,
        block_size: int,
        representative_size: int,
        has_positions: bool,
        scaling: float,
        newer: float,
    ) -> None:
        """Choose the blocks of an interval that begins with the new token, and copy them.

        Args:
            query: of the new token, ``(B, H, D)``.
            kept_keys: ``(B, G, num_kept + 1, D)``.
            queries, keys, values, num_chosen: see `LayerMemory`. They change.
        """
        batch_size, num_heads, head_dim = query.shape
        num_groups, interval, num_rows = kept_keys.shape[1], queries.shape[2] - 1, len(self.rows)
        num_programs, num_queries = batch_size * num_groups, num_heads // num_groups * interval
        num_representatives = block_size // representative_size
        tile = max(MIN_TILE, min(MAX_TILE, TILE_BYTES // (query.element_size() * block_of_dims(head_dim))))
        block_queries = min(tile, max(MIN_TILE, triton.next_power_of_2(num_queries)))
        block_representatives = min(tile, triton.next_power_of_2(num_representatives))
        num_parts, inv_freq = triton.cdiv(num_queries, block_queries), frequencies(encoding, query, has_positions)
        constants: dict[str, Any] = {
            "NUM_KEPT": shape.num_kept,
            "WINDOW": shape.window,
            "BLOCK_SIZE": block_size,
            "INTERVAL": interval,
            "NUM_QUERIES": num_queries,
            "BLOCK_QUERIES": block_queries,
            "DIM": head_dim,
            "BLOCK_DIM": block_of_dims(head_dim),
            "HALF_ROTARY": inv_freq.shape[0],
            "INTERLEAVED": encoding.interleaved,
            "NUM_GROUPS": num_groups,
            "num_warps": 4,
        }
        query = query if query.stride(-1) == 1 else query.contiguous()
        keys, values = as_words(keys, num_rows), as_words(values, num_rows)
        size = keys.numel() // num_rows
        with torch.cuda.device_of(query):
            _score_kernel[num_programs, SCORE_SPLITS, num_parts](
                *(query, *query.stride()[:2], base, inv_freq, queries, num_seen, self.addresses),
                SCALING=scaling,
                REPRESENTATIVES=num_representatives,
                BLOCK_REPRESENTATIVES=block_representatives,
                BLOCKS=tile // block_representatives,
                SPLITS=SCORE_SPLITS,
                **constants,
            )
            _choose_kernel[num_programs,](
                *(kept_keys, inv_freq, queries, num_seen, self.addresses, self.rows, num_chosen),
                NUM_BLOCKS=num_rows // num_programs,
                NUM_PARTS=num_parts,
                BLOCK=CHOSEN_FROM,
                BLOCK_KEPT=MIN_TILE,
                NEWER=newer,
                **constants,
            )
            _copy_kernel[num_rows, triton.cdiv(size, COPIED)](
                keys, values, self.addresses, self.rows, SIZE=size, BLOCK=COPIED, num_warps=4
            )


def as_words(states: Tensor, num_rows: int) -> Tensor:
    """View contiguous states as words of 64 bits if rows consist of whole ones."""
    flat = states.flatten()
    return flat.view(WORD) if flat.nbytes // num_rows % WORD.itemsize == 0 else flat


@triton.jit
def _score_kernel(
    query, query_row_stride, query_head_stride, base, inv_freq, queries, num_seen, addresses,
    SCALING: tl.constexpr, NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERVAL: tl.constexpr, NUM_QUERIES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    REPRESENTATIVES: tl.constexpr, BLOCK_REPRESENTATIVES: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Score blocks for the last queries. The first split of the blocks stores the new query.

    A program per group of heads and row, split of the blocks, and part of the queries.
    """
    row_group, split, num_programs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    row, group = row_group // NUM_GROUPS, row_group % NUM_GROUPS
    each, dims = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_DIM)
    head, age, has_dim, has_query = each // INTERVAL, each % INTERVAL, dims < DIM, each < NUM_QUERIES
    token, mask = tl.load(num_seen + row), has_query[:, None] & has_dim[None, :]
    query += row * query_row_stride + group * (NUM_QUERIES // INTERVAL) * query_head_stride
    turned = _turned(
        query, query_head_stride, head, has_query, inv_freq, WINDOW + BLOCK_SIZE - (token - tl.load(base + row)),
        DIM, dims, HALF_ROTARY, INTERLEAVED,
    )  # fmt: skip
    kind = queries.dtype.element_ty
    new = (turned.to(kind).to(tl.float32) * SCALING).to(kind)
    rows = row_group * (NUM_QUERIES // INTERVAL) * (INTERVAL + 1) + _row_of_query(each, token, INTERVAL)
    places = queries + rows[:, None] * DIM + dims[None, :]
    if split == 0:
        tl.store(places, new, mask=mask & (age == 0)[:, None])
    states = tl.where((age == 0)[:, None], new, tl.load(places, mask=mask & (age > 0)[:, None], other=0.0))

    index = tl.load(addresses + 2).to(tl.pointer_type(kind))
    scores, capacity = tl.load(addresses + 4).to(tl.pointer_type(tl.float32)), tl.load(addresses + 5)
    scores += (row_group * NUM_QUERIES + each)[:, None] * capacity
    num_evicted = tl.maximum(token - NUM_KEPT - WINDOW, 0) // BLOCK_SIZE
    place = tl.arange(0, BLOCKS * BLOCK_REPRESENTATIVES)
    for start in range(split * BLOCKS, num_evicted, SPLITS * BLOCKS):
        blocks = start + place // BLOCK_REPRESENTATIVES
        best = tl.full([BLOCK_QUERIES, BLOCKS], -float("inf"), tl.float32)
        for first in range(0, REPRESENTATIVES, BLOCK_REPRESENTATIVES):
            representatives = first + place % BLOCK_REPRESENTATIVES
            is_key = (blocks < num_evicted) & (representatives < REPRESENTATIVES)
            keys = (blocks * num_programs + row_group) * REPRESENTATIVES + representatives
            means = tl.load(
                index + keys[:, None] * DIM + dims[None, :], mask=is_key[:, None] & has_dim[None, :], other=0.0
            )
            found = tl.dot(states, tl.trans(means), input_precision="ieee")
            found = tl.where(is_key[None, :], found, -float("inf"))
            found = tl.reshape(found, (BLOCK_QUERIES, BLOCKS, BLOCK_REPRESENTATIVES))
            best = tl.maximum(best, tl.max(found, axis=2))
        columns = start + tl.arange(0, BLOCKS)
        tl.store(scores + columns[None, :], best, mask=has_query[:, None] & (columns < num_evicted)[None, :])


@triton.jit
def _row_of_query(each, token, INTERVAL: tl.constexpr):
    """Return the row of the query ``each % INTERVAL`` tokens ago of head ``each // INTERVAL``."""
    return each // INTERVAL * (INTERVAL + 1) + (token - each % INTERVAL) % (INTERVAL + 1)


@triton.jit
def _choose_kernel(
    kept_keys, inv_freq, queries, num_seen, addresses, rows, num_chosen,
    NUM_KEPT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERVAL: tl.constexpr, NUM_QUERIES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HALF_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEPT: tl.constexpr,
    NEWER: tl.constexpr,
):  # fmt: skip
    """Choose the blocks of the largest weights, see `LayerMemory.weights`.

    A program per group of heads and row.
    """
    row_group, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    token = tl.load(num_seen + row_group // NUM_GROUPS)
    dims, columns = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK)
    weights, scores = tl.load(addresses + 3).to(tl.pointer_type(tl.float32)), tl.load(addresses + 4)
    scores, capacity = scores.to(tl.pointer_type(tl.float32)), tl.load(addresses + 5)
    weights += row_group * capacity
    queries += row_group * (NUM_QUERIES // INTERVAL) * (INTERVAL + 1) * DIM
    num_evicted = tl.maximum(token - NUM_KEPT - WINDOW, 0) // BLOCK_SIZE

    for part in range(NUM_PARTS):
        each = part * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        has_query = each < NUM_QUERIES
        own_scores = scores + (row_group * NUM_QUERIES + each)[:, None] * capacity
        peak, total = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32), tl.zeros([BLOCK_QUERIES], tl.float32)
        if NUM_KEPT > 0:
            # Queries have the phase W + block_size. That of a query that sees a kept key is S + W.
            turned = _turned(
                queries, DIM, _row_of_query(each, token, INTERVAL), has_query, inv_freq,
                token * 0 + NUM_KEPT - BLOCK_SIZE, DIM, dims, HALF_ROTARY, INTERLEAVED,
            ).to(queries.dtype.element_ty)  # fmt: skip
            for start in range(0, NUM_KEPT, BLOCK_KEPT):
                slots = start + tl.arange(0, BLOCK_KEPT)
                keys = tl.load(
                    kept_keys + (row_group * (NUM_KEPT + 1) + slots)[:, None] * DIM + dims[None, :],
                    mask=(slots < NUM_KEPT)[:, None] & (dims < DIM)[None, :], other=0.0,
                )  # fmt: skip
                found = tl.dot(turned, tl.trans(keys), input_precision="ieee")
                peak, total = _add_scores(tl.where((slots < NUM_KEPT)[None, :], found, -float("inf")), peak, total)
        for start in range(0, num_evicted, BLOCK):
            mask = has_query[:, None] & (start + columns < num_evicted)[None, :]
            found = tl.load(own_scores + (start + columns)[None, :], mask=mask, other=-float("inf"))
            peak, total = _add_scores(found, peak, total)
        peak, total = tl.where(has_query, peak, 0.0), tl.where(has_query, total, 1.0)
        for start in range(0, num_evicted, BLOCK):
            is_block = start + columns < num_evicted
            mask = has_query[:, None] & is_block[None, :]
            found = tl.load(own_scores + (start + columns)[None, :], mask=mask, other=-float("inf"))
            shares = tl.sum(tl.exp(found - peak[:, None]) / total[:, None], axis=0)
            before = tl.load(weights + start + columns, mask=is_block & (part > 0), other=0.0)
            tl.store(weights + start + columns, before + shares, mask=is_block)
        tl.debug_barrier()  # all weights are written before they are read
    if row_group == 0:
        tl.store(num_chosen, tl.minimum(num_evicted, NUM_BLOCKS))
    for i in range(NUM_BLOCKS):
        best, block = tl.full([], -1.0, tl.float32), tl.zeros([], tl.int64)
        for start in range(0, num_evicted, BLOCK):
            found = tl.load(weights + start + columns, mask=start + columns < num_evicted, other=-1.0)
            found *= 1.0 + NEWER * (start + columns).to(tl.float32)
            top, place = tl.max(found, axis=0, return_indices=True)
            block = tl.where(top > best, start + place, block)
            best = tl.maximum(best, top)
        tl.debug_barrier()  # all have read the weights before one changes
        tl.store(weights + block, -1.0)
        tl.debug_barrier()
        tl.store(rows + row_group * NUM_BLOCKS + i, block * num_programs + row_group)


@triton.jit
def _add_scores(found, peak, total):
    """Add scores ``(queries, columns)`` to a running log-sum-exp."""
    new_peak = tl.maximum(peak, tl.max(found, axis=1))
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    return new_peak, total * tl.exp(peak - shift) + tl.sum(tl.exp(found - shift[:, None]), axis=1)


@triton.jit
def _copy_kernel(keys, values, addresses, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy chosen blocks of keys and values. A program per row and part of it."""
    row, offsets = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source, target, mask = tl.load(rows + row) * SIZE + offsets, row * SIZE + offsets, offsets < SIZE
    kind: tl.constexpr = tl.pointer_type(keys.dtype.element_ty)
    tl.store(keys + target, tl.load(tl.load(addresses).to(kind) + source, mask=mask), mask=mask)
    tl.store(values + target, tl.load(tl.load(addresses + 1).to(kind) + source, mask=mask), mask=mask)


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
