"""Rotary embedding and GELU of a layer, fused with bias gradients, for compiled training on a GPU.

The linear layer before a GELU or a rotary embedding adds its bias in the forward pass, but the
backward kernels here compute the bias gradient. Callers therefore detach the bias in the linear
layer (`linear_but_bias_gradient`) and pass it to the functions of this module. The kernels are in
`layer_kernels`; without them, in eager mode and on other devices, plain torch is used.

A product in float8 needs the largest absolute values of its inputs, their "peaks". The kernels also
compute them. That of the output of GELU is returned. That of the gradient of a linear layer's
output is handed to the layer as the gradient of a second, empty output: its carrier.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .float8 import Float8Linear

try:
    from . import layer_kernels as kernels
except ImportError:  # Triton comes with torch's CUDA builds
    kernels = None  # type: ignore[assignment]


def is_fused(states: Tensor) -> bool:
    """Whether the kernels are used: in training with `torch.compile` on CUDA, except in float64."""
    is_trained = torch.is_grad_enabled() and torch.compiler.is_compiling()
    return is_trained and kernels is not None and states.is_cuda and states.dtype != torch.float64


def linear_but_bias_gradient(linear: nn.Linear, states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply a linear layer without a gradient for its bias.

    Returns:
        The output, and the carrier of the peak of its gradient, for the function that uses the
        output; None if the layer does not need it.
    """
    if isinstance(linear, Float8Linear) and linear.training:
        return linear.product_with_carrier(states, linear.bias.detach())
    return nn.functional.linear(states, linear.weight, linear.bias.detach()), None


class BiasedGelu(torch.autograd.Function):
    """GELU of states ``(…, C)`` that include a bias ``(C,)``; the bias only gets its gradient.

    Returns the result and its peak, float32 ``()``.

    Args:
        carrier: see `linear_but_bias_gradient`.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, bias: Tensor, carrier: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states)
        ctx.bias_dtype, ctx.has_carrier = bias.dtype, carrier is not None
        out, peaks = kernels.gelu(states.flatten(0, -2))
        peak = peaks.amax()
        ctx.mark_non_differentiable(peak)
        return out.view(states.shape), peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (states,) = ctx.saved_tensors
        grad_states, sums, peaks = kernels.gelu_backward(grad.contiguous().flatten(0, -2), states.flatten(0, -2))
        return grad_states.view(states.shape), sums.sum(0).to(ctx.bias_dtype), peaks.amax() if ctx.has_carrier else None


class RotatedHeads(torch.autograd.Function):
    """Split projections ``(B, T, H, 3 D)`` into rotated queries and keys, and values.

    Each result has the shape ``(B, T, H, D)``.

    Args:
        bias: ``(H × 3 D,)``, already added to the projections.
        cos, sin: ``(T, rotated dimensions)``; the second half repeats the first.
        carrier: see `linear_but_bias_gradient`.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, carrier: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.bias_dtype, ctx.has_carrier = bias.dtype, carrier is not None
        query, key = kernels.rotate_heads(heads, cos, sin)
        return query, key, heads[..., 2 * query.shape[-1] :]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, Tensor, None, None, Tensor | None]:
        grad_heads, sums, peaks = kernels.rotate_heads_backward(grad_query, grad_key, grad_value, *ctx.saved_tensors)
        grad_bias, peak = sums.sum(0).flatten().to(ctx.bias_dtype), peaks.amax() if ctx.has_carrier else None
        return grad_heads, grad_bias, None, None, peak
