"""The chosen blocks of a memory: copy them from host memory, and attend to them."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parts import LOG2E, _attend_band, _turned

WORD = torch.int64
COPIED = 1024  # words that a program copies


def copy_blocks(sources: Sequence[Tensor], targets: Sequence[Tensor], rows: Tensor) -> None:
    """Copy rows of several layers in one kernel.

    Args:
        sources: contiguous tensors of one dtype that the device can read, with rows of one size.
        targets: a contiguous tensor for each of them, for equally many rows.
        rows: numbers of the rows in the sources, one layer after the other, ``(L * R,)``.
    """
    num_rows, like = len(rows) // len(sources), targets[0].flatten()
    if like.nbytes // num_rows % WORD.itemsize == 0:
        like = like.view(WORD)  # the kernel loads whole words
    size = len(like) // num_rows
    addresses = torch.tensor([each.data_ptr() for each in (*sources, *targets)], pin_memory=rows.is_cuda)
    addresses = addresses.to(rows.device, non_blocking=True)
    grid = len(rows), triton.cdiv(size, COPIED)
    with torch.cuda.device_of(rows):
        _copy_kernel[grid](like, addresses, rows, len(sources), num_rows, SIZE=size, BLOCK=COPIED, num_warps=4)


@triton.jit
def _copy_kernel(like, addresses, rows, num_layers, num_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program per row and part of it.

    Args:
        like: a tensor of the type of the words.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer = row // num_rows
    source = tl.load(addresses + layer).to(tl.pointer_type(like.dtype.element_ty)) + tl.load(rows + row) * SIZE
    target = tl.load(addresses + num_layers + layer).to(tl.pointer_type(like.dtype.element_ty))
    target += row % num_rows * SIZE
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
