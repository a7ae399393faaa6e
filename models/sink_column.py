"""An extra column in every softmax: a sink without a token, a position or a cache entry.

A fused kernel computes the other columns. Let o be its output and l its log-sum-exp. A column with
score s and value v changes them to

    l' = log(exp(l) + exp(s)),    o' = exp(l - l') o + exp(s - l') v

The kernel's backward pass, called with o' and l', returns the gradients of query, key and value: it
only uses the probabilities ``exp(score - l')`` and the row sums of ``grad * o'``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused_attention import Kernel, kernel_for


class SinkColumn(NamedTuple):
    """A softmax column.

    Args:
        score: scaled score, at least float32, broadcasts to ``(B, H, T)``.
        value: ``(H, D)``, or ``(B, H, T, D)`` if each query has its own; None for zeros.
    """

    score: Tensor
    value: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The value, which broadcasts to ``(B, H, T, D)``."""
        assert self.value is not None
        return self.value[:, None] if self.value.ndim == 2 else self.value


def attention_with_column(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    column: SinkColumn,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention of queries ``(B, H, T, D)`` over keys ``(B, H, K, D)`` and the column.

    Args:
        mask: as in `explicit_attention`; None is causal attention, or all keys for one query.
        dropout: as in `explicit_attention`.

    Returns:
        ``(B, H, T, D)``.
    """
    num_queries = query.shape[2]
    if mask is None and num_queries > 1:
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]  # drop the empty slots of a static cache
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = None if dropout or mask is not None else kernel_for(query)
    if kernel is not None:
        return FusedAttention.apply(query, key, value, *column, scaling, kernel)
    if mask is None and num_queries > 1:
        mask = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).tril()
    return explicit_attention(query, key, value, mask, column, scaling, dropout)[0]


def merge_column(out: Tensor, lse: Tensor, column: SinkColumn) -> tuple[Tensor, Tensor]:
    """Add a column to a softmax.

    Args:
        out: output ``(B, H, T, D)`` without the column.
        lse: log-sum-exp ``(B, H, T)`` without the column.

    Returns:
        Output and log-sum-exp with the column, in the same shapes.
    """
    total = torch.logaddexp(lse, column.score)
    widened = out * (lse - total).exp()[..., None]
    if column.value is not None:
        widened = widened + (column.score - total).exp()[..., None] * column.values
    return widened.to(out.dtype), total


def column_gradients(
    grad: Tensor, out: Tensor, total: Tensor, column: SinkColumn, is_needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a column's score and value.

    Args:
        grad: gradient of the output, ``(B, H, T, D)``.
        out, total: output and log-sum-exp with the column.
        is_needed: whether the score's and the value's gradient are needed; the others are None.
    """
    score, sink_value = column
    grad_score = grad_value = None
    probability = (score - total).exp()[..., None]  # of the column, (B, H, T, 1)
    if is_needed[0]:
        gain = -out if sink_value is None else sink_value[:, None] - out
        grad_score = (probability * grad * gain).sum(-1).sum_to_size(score.shape)
    if sink_value is not None and is_needed[1]:
        grad_value = (probability * grad).sum((0, 2)).to(sink_value.dtype)
    return grad_score, grad_value


class FusedAttention(torch.autograd.Function):
    """Causal attention with a column, computed by a fused kernel.

    In half precision, no tensor with a dimension of size D is stored in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score: Tensor,
        sink_value: Tensor | None,
        scaling: float,
        kernel: Kernel,
    ) -> Tensor:
        ctx.kernel, ctx.is_causal, ctx.scaling = kernel, query.shape[2] > 1, scaling
        column = SinkColumn(score, sink_value)
        out, total = merge_column(*kernel.forward(query, key, value, ctx.is_causal, scaling), column)
        total = total.contiguous()
        ctx.save_for_backward(query, key, value, score, sink_value, out, total)
        return out.view_as(out)  # torch 2.11 compiles no gradient if the last operation returns its own input

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, value, score, sink_value, out, total = ctx.saved_tensors
        grads = ctx.kernel.backward(grad, query, key, value, out, total, ctx.is_causal, ctx.scaling)
        of_column = column_gradients(grad, out, total, SinkColumn(score, sink_value), ctx.needs_input_grad[3:5])
        return *grads, *of_column, None, None


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    column: SinkColumn | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute attention, usually with a column, by an explicit softmax, for any mask.

    Args:
        mask: boolean (True is visible) or additive, broadcasts to ``(B, H, T, K)``; None shows all
            keys.
        dropout: share of probabilities to drop.

    Returns:
        The output ``(B, H, T, D)`` and the probabilities of the keys ``(B, H, T, K)``, which sum to
        1 together with that of a column.
    """
    dtype = torch.promote_types(query.dtype, torch.float32) if column is None else column.score.dtype
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.transpose(-1, -2).to(dtype) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if column is not None:
        scores = torch.cat((scores, column.score.expand(scores.shape[:-1])[..., None]), dim=-1)
    weights = torch.dropout(scores.softmax(-1).to(value.dtype), dropout, train=dropout > 0)
    if column is None:
        return weights @ value, weights
    weights, sink_weight = weights[..., :-1], weights[..., -1:]
    out = weights @ value
    if column.value is not None:
        out = out + sink_weight * column.values.to(out.dtype)
    return out, weights
