"""Fused attention of windowed layers on CUDA in half precision, forward and backward.

A library's kernel computes the band (`band`), and no key outside of it. The kept keys are merged
into its result (`window_kernels`), and then an arm's column (`sink_column`). The backward pass of
the band, called with the merged output and log-sum-exp, returns its part of the gradients; the kept
keys add theirs. No mask and no tensor of a size T × W exists.

The passes are custom operators, so `torch.compile` does not trace into them, and a window that is
drawn in each step is an argument that changes without recompilation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from .band import band_backward, band_forward, can_cudnn
from .fused_attention import can_flash
from .sink_column import SinkColumn, column_gradients, merge_column
from .windows import WindowRule

try:
    from . import window_kernels as kernels
except ImportError:  # Triton comes with torch's CUDA builds
    kernels = None  # type: ignore[assignment]


def is_fused(query: Tensor, rule: WindowRule, dropout: float) -> bool:
    """Whether `fused_windowed_attention` supports queries ``(B, H, T, D)`` under this rule.

    It requires Triton, what `can_flash` does, and neither padding nor dropout.
    """
    return kernels is not None and rule.is_dense and not dropout and can_flash(query)


def fused_windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: WindowRule, column: SinkColumn | None, scaling: float
) -> Tensor:
    """Compute attention under the rule of windowed layers.

    Args:
        query: ``(B, T, H, D)``, the queries of the last T keys.
        key, value: ``(B, K, H, D)``; the kept tokens are the first ones.

    Returns:
        ``(B, T, H, D)``.
    """
    score, sink_value = (None, None) if column is None else column
    num_kept = min(rule.num_kept, key.shape[1])
    tables = rule.cos[0], rule.sin[0]
    by_cudnn = rule.drawn is None and can_cudnn(query, key)
    settings = (rule.window, num_kept, scaling, by_cudnn)
    return FusedWindows.apply(query, key, value, score, sink_value, *tables, rule.drawn, *settings)


class FusedWindows(torch.autograd.Function):
    """Band, kept keys and column of one softmax, see `fused_windowed_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score: Tensor | None,
        sink_value: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        drawn: Tensor | None,
        window: int,
        num_kept: int,
        scaling: float,
        by_cudnn: bool,
    ) -> Tensor:
        ctx.settings = (window, num_kept, scaling, by_cudnn)
        out, total = windows_forward(query, key, value, cos, sin, drawn, *ctx.settings)
        if score is not None:
            merged, total = merge_column(out.transpose(1, 2), total, SinkColumn(score, sink_value))
            out, total = merged.transpose(1, 2), total.contiguous()
        ctx.save_for_backward(query, key, value, score, sink_value, out, total, cos, sin, drawn)
        return out.view_as(out)  # torch 2.11 compiles no gradient if the last operation returns its own input

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, value, score, sink_value, out, total, cos, sin, drawn = ctx.saved_tensors
        grads = windows_backward(grad, query, key, value, out, total, cos, sin, drawn, *ctx.settings)
        of_column: tuple[Tensor | None, Tensor | None] = (None, None)
        if score is not None:
            states = (grad.transpose(1, 2), out.transpose(1, 2), total)
            of_column = column_gradients(*states, SinkColumn(score, sink_value), ctx.needs_input_grad[3:5])
        return *grads, *of_column, *[None] * 7


@custom_op("sinklm::windows_forward", mutates_args=())
def windows_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    drawn: Tensor | None,
    window: int,
    num_kept: int,
    scaling: float,
    by_cudnn: bool,
) -> tuple[Tensor, Tensor]:
    """Compute attention over the band and the kept keys.

    Args:
        drawn: replaces ``window`` if it is not None.
        by_cudnn: see `band`.

    Returns:
        The output ``(B, T, H, D)`` and the log-sum-exp of the scores, float32 ``(B, H, T)``.
    """
    width = _width(drawn, window)
    out, lse = band_forward(query, key, value, width, scaling, by_cudnn)
    if num_kept:
        kernels.merge_kept_(query, key, value, out, lse, cos, sin, width, num_kept, scaling)
    return out, lse


@windows_forward.register_fake
def _(query, key, value, cos, sin, drawn, window, num_kept, scaling, by_cudnn):
    batch_size, num_queries, num_heads, _ = query.shape
    lse = query.new_empty(batch_size, num_heads, num_queries, dtype=torch.float32)
    return query.new_empty(query.shape), lse


@custom_op("sinklm::windows_backward", mutates_args=())
def windows_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    drawn: Tensor | None,
    window: int,
    num_kept: int,
    scaling: float,
    by_cudnn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from the result of the whole softmax."""
    width, grad, out = _width(drawn, window), grad.contiguous(), out.contiguous()
    grads = band_backward(grad, query, key, value, out, lse, width, scaling, by_cudnn)
    if num_kept:
        states = (grad, query, key, value, out, lse, grads, cos, sin)
        kernels.add_kept_gradients_(*states, width, num_kept, scaling)
    return grads


@windows_backward.register_fake
def _(grad, query, key, value, out, lse, cos, sin, drawn, window, num_kept, scaling, by_cudnn):
    return tuple(states.new_empty(states.shape) for states in (query, key, value))


def _width(drawn: Tensor | None, window: int) -> int:
    if drawn is None:
        return window
    if not 1 <= (width := int(drawn)) <= window:
        raise ValueError(f"window is {width}: it must be between 1 and the window of each layer, here {window}")
    return width
