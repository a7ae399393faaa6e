"""Triton kernels between the matrix products of a layer in training: GELU and rotary embedding.

Each value is read from memory once and written once. Both backward passes also sum over rows,
because these sums are the gradient of the bias before them; a separate pass would read everything
again. Each program sums ``ROWS`` rows; the caller sums the results over programs. For the same
reason, kernels whose results are cast to float8 return the largest absolute value of each program
(its "peak", 0 for a program of NaN only); the caller takes the largest of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS = 256  # rows per program of a backward pass
ROW_BLOCK = 16  # rows that a program processes at a time
GELU_COLUMNS = 128


@triton_op("sinklm::gelu", mutates_args={})
def gelu(states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU ``x Φ(x)`` of states ``(N, C)``.

    Returns:
        The result, and its peaks, float32 ``(programs,)``.
    """
    out = torch.empty_like(states)
    num_rows, num_columns = states.shape
    grid = (triton.cdiv(num_columns, GELU_COLUMNS), triton.cdiv(num_rows, ROW_BLOCK))
    peaks = states.new_empty(grid[0] * grid[1], dtype=torch.float32)
    wrap_triton(_gelu_kernel)[grid](states, out, peaks, num_rows, num_columns, ROW_BLOCK, GELU_COLUMNS, num_warps=8)
    return out, peaks


@triton_op("sinklm::gelu_backward", mutates_args={})
def gelu_backward(grad: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass of `gelu`.

    Args:
        grad: gradient of the output, ``(N, C)``.
        states: input of `gelu`, ``(N, C)``.

    Returns:
        The gradient of ``states`` ``(N, C)``, its partial sums over rows, float32
        ``(programs, C)``, and its peaks, float32 ``(all programs,)``.
    """
    num_rows, num_columns = states.shape
    num_programs = triton.cdiv(num_rows, ROWS)
    grad_states = torch.empty_like(states)
    sums = states.new_empty(num_programs, num_columns, dtype=torch.float32)
    grid = (triton.cdiv(num_columns, GELU_COLUMNS), num_programs)
    peaks = states.new_empty(grid[0] * grid[1], dtype=torch.float32)
    wrap_triton(_gelu_backward_kernel)[grid](
        *(grad, states, grad_states, sums, peaks, num_rows, num_columns), ROWS, ROW_BLOCK, GELU_COLUMNS, num_warps=8
    )
    return grad_states, sums, peaks


@triton_op("sinklm::rotate_heads", mutates_args={})
def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys, each ``(B, T, H, D)``, from ``heads`` ``(B, T, H, 3 D)``.

    Args:
        cos, sin: ``(T, R)`` for the first R dimensions; the second half repeats the first.
    """
    batch_size, num_positions, num_heads, width = heads.shape
    head_size = width // 3
    query, key = (heads.new_empty(batch_size, num_positions, num_heads, head_size) for _ in range(2))
    num_rows, block = batch_size * num_positions, triton.next_power_of_2(head_size)
    grid = (num_heads, 2, triton.cdiv(num_rows, ROW_BLOCK))
    wrap_triton(_rotate_kernel)[grid](
        *(heads, query, key, cos, sin, num_rows, num_positions), num_heads, head_size, cos.shape[-1], ROW_BLOCK, block
    )
    return query, key


@triton_op("sinklm::rotate_heads_backward", mutates_args={})
def rotate_heads_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass of `rotate_heads`.

    Args:
        grad_query, grad_key: gradients of the outputs of `rotate_heads`, ``(B, T, H, D)``.
        grad_value: gradient of the last third of each head, ``(B, T, H, D)``.

    Returns:
        The gradient of ``heads`` ``(B, T, H, 3 D)``, its partial sums over positions, float32
        ``(programs, H, 3 D)``, and its peaks, float32 ``(all programs,)``.
    """
    batch_size, num_positions, num_heads, head_size = grad_query.shape
    num_rows, block = batch_size * num_positions, triton.next_power_of_2(head_size)
    num_programs = triton.cdiv(num_rows, ROWS)
    grad_heads = grad_query.new_empty(batch_size, num_positions, num_heads, 3 * head_size)
    sums = grad_query.new_empty(num_programs, num_heads, 3 * head_size, dtype=torch.float32)
    peaks = grad_query.new_empty(num_heads * 3 * num_programs, dtype=torch.float32)
    gradients = (gradient.contiguous() for gradient in (grad_query, grad_key, grad_value))
    wrap_triton(_rotate_backward_kernel)[num_heads, 3, num_programs](
        *(*gradients, grad_heads, sums, peaks, cos, sin, num_rows, num_positions),
        *(num_heads, head_size, cos.shape[-1], ROWS, ROW_BLOCK, block),
    )
    return grad_heads, sums, peaks


@triton.jit
def _normal(x):
    """Return the normal distribution's cumulative Φ(x) and density φ(x) of float32 x.

    Abramowitz & Stegun 7.1.26, with an error of at most 7e-8. It reuses the exponential of the
    density, so the backward pass is bound by memory; with the math library's erf it would be bound
    by arithmetic.
    """
    exponential = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))  # 0.3275911 / √2
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = series * exponential
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * exponential


@triton.jit
def _program():
    """Return the number of this program."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _peak(values, dtype: tl.constexpr):
    """Return the largest of values that are at least 0, as rounded to the dtype of the result."""
    return tl.max(tl.max(values, axis=1), axis=0).to(dtype).to(tl.float32)


@triton.jit
def _gelu_kernel(states, out, peaks, num_rows, num_columns, ROW_BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None]
    rows = tl.program_id(1) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    places = rows.to(tl.int64) * num_columns + columns
    mask = (rows < num_rows) & (columns < num_columns)
    x = tl.load(states + places, mask=mask, other=0.0).to(tl.float32)
    cumulative, _ = _normal(x)
    tl.store(out + places, (x * cumulative).to(out.dtype.element_ty), mask=mask)
    tl.store(peaks + _program(), _peak(tl.abs(x * cumulative), out.dtype.element_ty))


@triton.jit
def _gelu_backward_kernel(
    grad, states, grad_states, sums, peaks, num_rows, num_columns,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROW_BLOCK, COLUMNS], tl.float32)
    largest = tl.zeros([ROW_BLOCK, COLUMNS], tl.float32)
    for start in range(0, ROWS, ROW_BLOCK):
        rows = tl.program_id(1) * ROWS + start + tl.arange(0, ROW_BLOCK)[:, None]
        places = rows.to(tl.int64) * num_columns + columns[None]
        mask = (rows < num_rows) & (columns[None] < num_columns)
        x = tl.load(states + places, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(grad + places, mask=mask, other=0.0).to(tl.float32)
        cumulative, density = _normal(x)
        gradient *= cumulative + x * density
        tl.store(grad_states + places, gradient.to(grad_states.dtype.element_ty), mask=mask)
        total += gradient
        largest = tl.maximum(largest, tl.abs(gradient))
    places = tl.program_id(1).to(tl.int64) * num_columns + columns
    tl.store(sums + places, tl.sum(total, axis=0), mask=columns < num_columns)
    tl.store(peaks + _program(), _peak(largest, grad_states.dtype.element_ty))


@triton.jit
def _turned(source, places, mask, dimension, position, cos, sin, sign, ROTATED: tl.constexpr):
    """Rotate one dimension of the heads at ``places`` by ``sign × angle``.

    Its partner is half the number of rotated dimensions away.
    """
    is_first = dimension < ROTATED // 2
    partner = tl.where(is_first, places + ROTATED // 2, places - ROTATED // 2)
    is_turned = mask & (dimension < ROTATED)
    angle = position * ROTATED + dimension
    cosine = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    own = tl.load(source + places, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=is_turned, other=0.0).to(tl.float32)
    return own * cosine + tl.where(is_first, -sign, sign) * other * sine


@triton.jit
def _rotate_kernel(
    heads, query, key, cos, sin, num_rows, num_positions,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROTATED: tl.constexpr,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0), tl.program_id(1)  # part 0: queries, part 1: keys
    dimension = tl.arange(0, BLOCK)[None]
    row = tl.program_id(2) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    mask = (row < num_rows) & (dimension < HEAD_SIZE)
    place = row.to(tl.int64) * NUM_HEADS + head
    turned = _turned(
        heads, 3 * HEAD_SIZE * place + part * HEAD_SIZE + dimension, mask, dimension, row % num_positions, cos, sin,
        1.0, ROTATED,
    )  # fmt: skip
    out = query if part == 0 else key
    tl.store(out + HEAD_SIZE * place + dimension, turned.to(query.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_backward_kernel(
    grad_query, grad_key, grad_value, grad_heads, sums, peaks, cos, sin, num_rows, num_positions,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, part, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dimension = tl.arange(0, BLOCK)
    source = grad_query if part == 0 else (grad_key if part == 1 else grad_value)
    total = tl.zeros([ROW_BLOCK, BLOCK], tl.float32)
    largest = tl.zeros([ROW_BLOCK, BLOCK], tl.float32)
    for start in range(0, ROWS, ROW_BLOCK):
        row = program * ROWS + start + tl.arange(0, ROW_BLOCK)[:, None]
        mask = (row < num_rows) & (dimension[None] < HEAD_SIZE)
        place = row.to(tl.int64) * NUM_HEADS + head
        places = HEAD_SIZE * place + dimension[None]
        if part == 2:
            turned = tl.load(source + places, mask=mask, other=0.0).to(tl.float32)
        else:
            turned = _turned(
                source, places, mask, dimension[None], row % num_positions, cos, sin, -1.0, ROTATED
            )  # fmt: skip
        packed = 3 * HEAD_SIZE * place + part * HEAD_SIZE + dimension[None]
        tl.store(grad_heads + packed, turned.to(grad_heads.dtype.element_ty), mask=mask)
        total += turned
        largest = tl.maximum(largest, tl.abs(turned))
    places = (program.to(tl.int64) * NUM_HEADS + head) * 3 * HEAD_SIZE + part * HEAD_SIZE + dimension
    tl.store(sums + places, tl.sum(total, axis=0), mask=dimension < HEAD_SIZE)
    tl.store(peaks + _program(), _peak(largest, grad_heads.dtype.element_ty))
