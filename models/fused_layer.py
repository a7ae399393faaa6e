"""A layer's rotary embedding, GELU and layer norms for compiled training on a GPU, with the gradients of their biases.

The bias before a GELU or a rotary embedding is added by the linear map in front, but its gradient is what the backward
kernel here adds up on its way. So callers detach it there, and give it here. `layer_kernels` has the kernels; without
them, in eager mode and on other devices the same is computed in plain torch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXMLP

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


class SinkLayer(GPTNeoXLayer):
    """GPT-NeoX's layer. Where attention and MLP read the same states, one backward pass goes through both norms.

    Takes norms and settings from one of transformers' own. Compiled in training, it calls neither norm's hooks.
    """

    def __init__(self, plain: GPTNeoXLayer, attention: nn.Module, mlp: nn.Module):
        nn.Module.__init__(self)
        self.use_parallel_residual = plain.use_parallel_residual
        self.input_layernorm, self.post_attention_layernorm = plain.input_layernorm, plain.post_attention_layernorm
        self.post_attention_dropout, self.post_mlp_dropout = plain.post_attention_dropout, plain.post_mlp_dropout
        self.attention, self.mlp = attention, mlp

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``(B, T, hidden)`` to the same; further arguments as transformers'."""
        has_dropout = self.training and self.post_mlp_dropout.p > 0
        if not self.use_parallel_residual or has_dropout or not is_fused(hidden_states):
            return super().forward(hidden_states, **kwargs)
        first, second = self.input_layernorm, self.post_attention_layernorm
        hidden_states, for_attention, for_mlp = ParallelNorms.apply(
            hidden_states, first.weight, first.bias, second.weight, second.bias, first.eps
        )
        attended, _ = self.attention(for_attention, **kwargs)
        return self.mlp(for_mlp) + attended + hidden_states


class SinkMLP(GPTNeoXMLP):
    """GPT-NeoX's MLP with the parameters of one of transformers' own."""

    def __init__(self, plain: GPTNeoXMLP, hidden_act: str):
        nn.Module.__init__(self)
        self.dense_h_to_4h, self.dense_4h_to_h, self.act = plain.dense_h_to_4h, plain.dense_4h_to_h, plain.act
        self.is_gelu = hidden_act == "gelu"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(B, T, hidden)`` to the same."""
        if not (self.is_gelu and is_fused(hidden_states)):
            return super().forward(hidden_states)
        inner = linear_but_bias_gradient(self.dense_h_to_4h, hidden_states)
        return self.dense_4h_to_h(BiasedGelu.apply(inner, self.dense_h_to_4h.bias))


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


class ParallelNorms(torch.autograd.Function):
    """States ``(…, C)`` themselves, and two layer norms of them."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        first_weight: Tensor,
        first_bias: Tensor,
        second_weight: Tensor,
        second_bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(states, first_weight, second_weight)
        ctx.eps = eps
        first = nn.functional.layer_norm(states, first_weight.shape, first_weight, first_bias, eps)
        second = nn.functional.layer_norm(states, second_weight.shape, second_weight, second_bias, eps)
        return states.view_as(states), first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, first_weight, second_weight = ctx.saved_tensors
        rows = [tensor.contiguous().flatten(0, -2) for tensor in (*grads, states)]
        grad_states, sums = kernels.norms_backward(*rows, first_weight, second_weight, ctx.eps)
        return grad_states.view(states.shape), *sums.sum(0).to(first_weight.dtype), None
