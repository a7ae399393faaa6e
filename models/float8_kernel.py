"""Triton kernel that casts a matrix to float8 as it is and transposed, in one pass over it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ROWS, COLUMNS, NUM_WARPS = 128, 64, 4  # tile of a program


@triton_op("sinklm::cast_float8", mutates_args={})
def cast_float8(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``scale × matrix`` ``(N, C)`` in float8, and its transpose, both contiguous."""
    num_rows, num_columns = matrix.shape
    as_it_is = matrix.new_empty(num_rows, num_columns, dtype=dtype)
    transposed = matrix.new_empty(num_columns, num_rows, dtype=dtype)
    grid = (triton.cdiv(num_columns, COLUMNS), triton.cdiv(num_rows, ROWS))
    wrap_triton(_cast_kernel)[grid](
        *(matrix, scale, as_it_is, transposed, num_rows, num_columns),
        *(True, ROWS, COLUMNS),
        num_warps=NUM_WARPS,
    )
    return as_it_is, transposed


@triton_op("sinklm::cast_float8_transposed", mutates_args={})
def cast_float8_transposed(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``scale × matrix`` ``(N, C)`` in float8, transposed ``(C, N)`` and contiguous."""
    num_rows, num_columns = matrix.shape
    transposed = matrix.new_empty(num_columns, num_rows, dtype=dtype)
    grid = (triton.cdiv(num_columns, COLUMNS), triton.cdiv(num_rows, ROWS))
    wrap_triton(_cast_kernel)[grid](
        *(matrix, scale, transposed, transposed, num_rows, num_columns),
        *(False, ROWS, COLUMNS),
        num_warps=NUM_WARPS,
    )
    return transposed


@triton.jit
def _cast_kernel(
    matrix, scale, as_it_is, transposed, num_rows, num_columns,
    BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    places = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    values = tl.load(matrix + places, mask=mask, other=0.0).to(tl.float32) * tl.load(scale)
    rounded = values.to(transposed.dtype.element_ty)
    if BOTH:
        tl.store(as_it_is + places, rounded, mask=mask)
    places = columns.to(tl.int64)[:, None] * num_rows + rows[None]
    tl.store(transposed + places, tl.trans(rounded), mask=tl.trans(mask))
