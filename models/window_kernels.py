"""Triton kernels that merge kept keys into attention over a band, forward and backward.

A fused kernel computes the band: its output and log-sum-exp. The kernels here read both, the
queries and the S kept keys once, and update output and log-sum-exp in place. In the backward pass
they add what the kept keys contribute to the gradients. Rows whose window reaches back to the first
token are skipped. Queries are turned back in registers, so no second set of queries is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # rows per program of the backward pass, which sums the gradients of kept keys over them
KEPT_BLOCK = 16  # kept keys that a program processes at a time; the smallest size of a matrix product
NUM_WARPS = 8
SIZES = ("window", "num_queries", "num_keys", "num_kept")


def merge_kept_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: int,
    num_kept: int,
    scaling: float,
) -> None:
    """Merge the kept keys into ``out`` ``(B, T, H, D)`` and ``lse`` ``(B, H, T)``, in place.

    Args:
        query: ``(B, T, H, D)``, the queries of the last T keys.
        key, value: ``(B, K, H, D)``; the first ``num_kept`` are kept.
        cos, sin: ``(T, rotated dimensions)``, by which queries are turned back.
    """
    batch_size, num_queries, num_heads, head_size = query.shape
    row_block = _row_block(head_size)
    _merge_kernel[triton.cdiv(num_queries, row_block), num_heads, batch_size](
        *(query, key, value, out, lse, cos.contiguous(), sin.contiguous()),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *(window, num_queries, key.shape[1], num_kept, scaling, num_heads),
        *(head_size, cos.shape[-1], row_block, KEPT_BLOCK, _dimensions(head_size)),
        num_warps=NUM_WARPS,
    )


def add_kept_gradients_(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    window: int,
    num_kept: int,
    scaling: float,
) -> None:
    """Add what kept keys contribute to ``grads``, the gradients of query, key and value, in place.

    Args:
        grad: gradient of the output, ``(B, T, H, D)``.
        out, lse: the result of the whole softmax.
        grads: ``(B, T, H, D)`` and twice ``(B, K, H, D)``; that of the query is contiguous.
    """
    batch_size, num_queries, num_heads, head_size = query.shape
    row_block, num_programs = _row_block(head_size), triton.cdiv(num_queries, ROWS)
    sums = query.new_empty(2, num_programs, batch_size, num_kept, num_heads, head_size, dtype=torch.float32)
    _gradient_kernel[num_programs, num_heads, batch_size](
        *(grad.contiguous(), query, key, value, out, lse, grads[0], sums[0], sums[1]),
        *(cos.contiguous(), sin.contiguous()),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *(window, num_queries, key.shape[1], num_kept, scaling, num_heads),
        *(head_size, cos.shape[-1], ROWS, row_block, KEPT_BLOCK, _dimensions(head_size)),
        num_warps=NUM_WARPS,
    )
    for gradient, of_kept in zip(grads[1:], sums.sum(1), strict=True):
        gradient[:, :num_kept] += of_kept


def _row_block(head_size: int) -> int:
    return 32 if head_size <= 64 else 16  # more rows do not fit into the registers


def _dimensions(head_size: int) -> int:
    return max(16, triton.next_power_of_2(head_size))


@triton.jit
def _partner(dimension, ROTATED: tl.constexpr):
    """Return the dimension with which a rotated one is rotated."""
    return tl.where(dimension < ROTATED // 2, dimension + ROTATED // 2, dimension - ROTATED // 2)


@triton.jit
def _rotation(cos, sin, row, dimension, mask, ROTATED: tl.constexpr):
    """Return the factors of a dimension and of its partner for a rotation by the negative angle."""
    is_turned = mask & (dimension < ROTATED)
    angle = row * ROTATED + dimension
    own = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
    other = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    return own, tl.where(dimension < ROTATED // 2, other, -other)


@triton.jit(do_not_specialize=SIZES)
def _merge_kernel(
    query, key, value, out, lse, cos, sin,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    window, num_queries, num_keys, num_kept, scaling, num_heads,
    HEAD_SIZE: tl.constexpr, ROTATED: tl.constexpr, ROW_BLOCK: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    index = num_keys - num_queries + row  # of the query's own key
    if num_keys - num_queries + block * ROW_BLOCK + ROW_BLOCK - 1 > window:
        dimension = tl.arange(0, DIM)
        mask = (row < num_queries)[:, None] & (dimension < HEAD_SIZE)[None]
        own, other = _rotation(cos, sin, row[:, None], dimension[None], mask, ROTATED)
        query += batch * query_batch + head * query_head
        rows = row.to(tl.int64)[:, None]
        q = tl.load(query + rows * query_row + dimension[None], mask=mask, other=0.0).to(tl.float32)
        is_turned = mask & (dimension < ROTATED)[None]
        partner = tl.load(query + rows * query_row + _partner(dimension, ROTATED)[None], mask=is_turned, other=0.0)
        q = (q * own + partner.to(tl.float32) * other).to(query.dtype.element_ty)

        places = ((batch * num_queries + rows) * num_heads + head) * HEAD_SIZE + dimension[None]
        o = tl.load(out + places, mask=mask, other=0.0).to(tl.float32)
        lses = lse + (batch * num_heads + head) * num_queries + row
        total = tl.load(lses, mask=row < num_queries, other=0.0)
        for start in range(0, num_kept, KEPT):
            kept = start + tl.arange(0, KEPT)
            kept_mask = (kept < num_kept)[:, None] & (dimension < HEAD_SIZE)[None]
            keys = key + batch * key_batch + head * key_head + kept[:, None] * key_row + dimension[None]
            values = value + batch * value_batch + head * value_head + kept[:, None] * value_row + dimension[None]
            k = tl.load(keys, mask=kept_mask, other=0.0)
            v = tl.load(values, mask=kept_mask, other=0.0)
            visible = (kept < num_kept)[None] & (kept[None] < index[:, None] - window)
            scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scaling, float("-inf"))
            largest = tl.maximum(total, tl.max(scores, axis=1))
            summed = tl.exp(total - largest) + tl.sum(tl.exp(scores - largest[:, None]), axis=1)
            new_total = largest + tl.log(summed)
            probabilities = tl.exp(scores - new_total[:, None])
            o = o * tl.exp(total - new_total)[:, None] + tl.dot(probabilities.to(v.dtype), v)
            total = new_total
        tl.store(out + places, o.to(out.dtype.element_ty), mask=mask)
        tl.store(lses, total, mask=row < num_queries)


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(
    grad, query, key, value, out, lse, grad_query, key_sums, value_sums, cos, sin,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    window, num_queries, num_keys, num_kept, scaling, num_heads,
    HEAD_SIZE: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, KEPT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    program, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dimension = tl.arange(0, DIM)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    for start in range(0, num_kept, KEPT):
        kept = start + tl.arange(0, KEPT)
        kept_mask = (kept < num_kept)[:, None] & (dimension < HEAD_SIZE)[None]
        k = tl.load(key + kept[:, None] * key_row + dimension[None], mask=kept_mask, other=0.0)
        v = tl.load(value + kept[:, None] * value_row + dimension[None], mask=kept_mask, other=0.0)
        partner_mask = kept_mask & (dimension < ROTATED)[None]
        k_partner = tl.load(
            key + kept[:, None] * key_row + _partner(dimension, ROTATED)[None], mask=partner_mask, other=0.0
        )
        key_sum = tl.zeros([KEPT, DIM], tl.float32)
        value_sum = tl.zeros([KEPT, DIM], tl.float32)
        for first in range(0, ROWS, ROW_BLOCK):
            row = program * ROWS + first + tl.arange(0, ROW_BLOCK)
            index = num_keys - num_queries + row  # of the query's own key
            if num_keys - num_queries + program * ROWS + first + ROW_BLOCK - 1 > window:
                mask = (row < num_queries)[:, None] & (dimension < HEAD_SIZE)[None]
                own, other = _rotation(cos, sin, row[:, None], dimension[None], mask, ROTATED)
                rows = row.to(tl.int64)[:, None]
                q = tl.load(query + rows * query_row + dimension[None], mask=mask, other=0.0).to(tl.float32)
                is_turned = mask & (dimension < ROTATED)[None]
                partner = tl.load(
                    query + rows * query_row + _partner(dimension, ROTATED)[None], mask=is_turned, other=0.0
                )
                q = (q * own + partner.to(tl.float32) * other).to(query.dtype.element_ty)

                places = ((batch * num_queries + rows) * num_heads + head) * HEAD_SIZE + dimension[None]
                g = tl.load(grad + places, mask=mask, other=0.0)
                o = tl.load(out + places, mask=mask, other=0.0)
                delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
                total = tl.load(lse + (batch * num_heads + head) * num_queries + row, mask=row < num_queries, other=0.0)
                visible = (kept < num_kept)[None] & (kept[None] < index[:, None] - window)
                visible = visible & (row < num_queries)[:, None]
                scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scaling, float("-inf"))
                probabilities = tl.exp(scores - total[:, None])
                grad_scores = probabilities * (tl.dot(g, tl.trans(v)) - delta[:, None]) * scaling
                value_sum += tl.dot(tl.trans(probabilities.to(g.dtype)), g)
                grad_scores = grad_scores.to(k.dtype)
                key_sum += tl.dot(tl.trans(grad_scores), q)
                added = tl.dot(grad_scores, k) * own - tl.dot(grad_scores, k_partner) * other
                before = tl.load(grad_query + places, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad_query + places, (before + added).to(grad_query.dtype.element_ty), mask=mask)
        sums = ((program * tl.num_programs(2) + batch) * num_kept + kept[:, None]) * num_heads + head
        sums = sums * HEAD_SIZE + dimension[None]
        tl.store(key_sums + sums, key_sum, mask=kept_mask)
        tl.store(value_sums + sums, value_sum, mask=kept_mask)
