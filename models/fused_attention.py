"""PyTorch's fused attention kernels with what `scaled_dot_product_attention` keeps to itself: the log-sum-exp.

A kernel's backward pass rebuilds the probabilities from the log-sum-exp, as ``exp(score - lse)``, and the rest from the
output. So whoever changes both consistently, as `sink_column` does, has the gradient of the changed attention for
nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # for FlashAttention's backward pass with large heads


class Kernel(NamedTuple):
    """Attention without mask and dropout, of one query or, if ``is_causal``, as many queries as keys.

    ``forward(query, key, value, is_causal, scaling)``, each ``(B, H, T, D)``, gives the output ``(B, H, T, D)`` and the
    log-sum-exp of the scores ``(B, H, T)``, float32 or better.
    ``backward(grad, query, key, value, output, lse, is_causal, scaling)`` gives the gradients of the three.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(query: Tensor) -> Kernel | None:
    """The fastest kernel for queries ``(B, H, T, D)``; None if there is none (float64 on CUDA, odd head sizes)."""
    head_size = query.shape[-1]
    if query.device.type == "cpu":
        return CPU
    if query.device.type != "cuda" or query.dtype == torch.float64 or head_size % 8:
        return None
    device = torch.cuda.get_device_properties(query.device)
    if query.dtype == torch.float32 or device.major < 8:
        return EFFICIENT
    is_trained = torch.is_grad_enabled() and query.requires_grad and query.shape[2] > 1
    if is_trained and device.major >= 9 and head_size <= 128:  # cuDNN plans anew for each length: not for generation
        return CUDNN
    largest = 192 if is_trained and (device.major, device.minor) in LITTLE_SHARED_MEMORY else 256
    return FLASH if head_size <= largest else EFFICIENT


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scaling)


def _cpu_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, is_causal, scale=scaling
    )


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scaling)
    return out, lse


def _flash_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    lengths = None, None, query.shape[2], key.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        *(grad, query, key, value, out, lse, *lengths, 0.0, is_causal, *_dropout_state(query)), scale=scaling
    )


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scaling
    )
    return out, lse[..., 0]


def _cudnn_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    lengths = None, None, query.shape[2], key.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, query, key, value, out, lse[..., None], *_dropout_state(query), None, *lengths, 0.0, is_causal),
        scale=scaling,
    )


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scaling
    )
    return out, lse[..., : query.shape[2]]


def _efficient_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # as the kernel's own forward pass leaves it
    wanted = (True, True, True, False)
    *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, padded, *_dropout_state(query), 0.0, wanted, is_causal, scale=scaling
    )
    return tuple(grads)


def _dropout_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that is not done.

    Not those that the forward pass gives: they lie on the CPU, and inductor takes them to be on the GPU.
    """
    return query.new_zeros((), dtype=torch.long), query.new_zeros((), dtype=torch.long)


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
