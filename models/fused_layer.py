"""A layer's rotary embedding and GELU for compiled training on a GPU, with the gradients of the biases before them.

The bias before a GELU or a rotary embedding is added by the linear map in front, but its gradient is what the backward
kernel here adds up on its way. So callers detach it there, and give it here. `layer_kernels` has the kernels; without
them, in eager mode and on other devices the same is computed in plain torch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from . import layer_kernels as kernels
except ImportError:  # Triton comes with torch's CUDA builds
    kernels = None  # type: ignore[assignment]


def is_fused(states: Tensor) -> bool:
    """Whether the kernels take these states: in training, where `torch.compile` joins them with all around."""
    is_trained = torch.is_grad_enabled() and torch.compiler.is_compiling()
    return is_trained and kernels is not None and states.is_cuda and states.dtype != torch.float64


def linear_but_bias_gradient(linear: nn.Linear, states: Tensor) -> Tensor:
    """The linear map, through which no gradient reaches its bias."""
    return nn.functional.linear(states, linear.weight, linear.bias.detach())


class BiasedGelu(torch.autograd.Function):
    """GELU of states ``(…, C)`` to which a bias ``(C,)`` was added."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        ctx.bias_dtype = bias.dtype
        return kernels.gelu(states.flatten(0, -2)).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (states,) = ctx.saved_tensors
        grad_states, sums = kernels.gelu_backward(grad.contiguous().flatten(0, -2), states.flatten(0, -2))
        return grad_states.view(states.shape), sums.sum(0).to(ctx.bias_dtype)


class RotatedHeads(torch.autograd.Function):
    """Queries and keys with their phases, and values, each ``(B, T, H, D)``, from projections ``(B, T, H, 3 D)``.

    Args:
        bias: ``(H × 3 D,)``, which was added to the projections.
        cos, sin: ``(T, rotated dimensions)``, the second half like the first.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.bias_dtype = bias.dtype
        query, key = kernels.rotate_heads(heads, cos, sin)
        return query, key, heads[..., 2 * query.shape[-1] :]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        grad_heads, sums = kernels.rotate_heads_backward(grad_query, grad_key, grad_value, *ctx.saved_tensors)
        return grad_heads, sums.sum(0).flatten().to(ctx.bias_dtype), None, None
