"""PyTorch's fused attention kernels, including the log-sum-exp of the scores.

`scaled_dot_product_attention` does not return the log-sum-exp. The backward pass of a kernel
recomputes the probabilities as ``exp(score - lse)`` and takes the rest from the output. A caller
that changes both consistently, as `sink_column` does, gets the gradient of the changed attention at
no extra cost.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
# Compute capabilities with too little shared memory for FlashAttention's backward pass at large
# head sizes.
LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


class Kernel(NamedTuple):
    """An attention kernel without mask and dropout.

    It supports one query, or with ``is_causal`` as many queries as keys.

    - ``forward(query, key, value, is_causal, scaling)``, each state ``(B, H, T, D)``, returns the
      output ``(B, H, T, D)`` and the log-sum-exp of the scores ``(B, H, T)``, at least float32;
    - ``backward(grad, query, key, value, output, lse, is_causal, scaling)`` returns the gradients
      of query, key and value.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(query: Tensor) -> Kernel | None:
    """Return the fastest kernel for queries ``(B, H, T, D)``.

    None if no kernel supports them: on CUDA, float64 or a head size that is not a multiple of 8.
    """
    head_size = query.shape[-1]
    if query.device.type == "cpu":
        return CPU
    if query.device.type != "cuda" or query.dtype == torch.float64 or head_size % 8:
        return None
    device = torch.cuda.get_device_properties(query.device)
    if query.dtype == torch.float32 or device.major < 8:
        return EFFICIENT
    is_trained = _is_trained(query)
    # cuDNN makes a plan per length, too slow to generate. Its backward pass adds in any order.
    if is_trained and device.major >= 9 and head_size <= 128 and not torch.are_deterministic_algorithms_enabled():
        return CUDNN
    return FLASH if can_flash(query) else EFFICIENT


def can_flash(query: Tensor) -> bool:
    """Whether FlashAttention supports queries ``(B, H, T, D)``, and their gradient if they need it.

    It requires CUDA with compute capability 8.0 or higher, half precision, and a head size of
    8, 16, …, 256; for a gradient on devices with `LITTLE_SHARED_MEMORY` at most 192.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    device = torch.cuda.get_device_properties(query.device)
    has_little = _is_trained(query) and (device.major, device.minor) in LITTLE_SHARED_MEMORY
    return device.major >= 8 and query.shape[-1] in range(8, (192 if has_little else 256) + 1, 8)


def _is_trained(query: Tensor) -> bool:
    return torch.is_grad_enabled() and query.requires_grad and query.shape[2] > 1


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
        *(grad, query, key, value, out, lse, *lengths, 0.0, is_causal, *no_dropout_state(query)), scale=scaling
    )


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scaling
    )
    return out, lse[..., 0]


def _cudnn_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    lengths = None, None, query.shape[2], key.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, query, key, value, out, lse[..., None], *no_dropout_state(query), None, *lengths, 0.0, is_causal),
        scale=scaling,
    )


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float):
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scaling
    )
    return out, lse[..., : query.shape[2]]


def _efficient_backward(grad, query, key, value, out, lse, is_causal: bool, scaling: float):
    padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # the padding of the kernel's forward pass
    wanted = (True, True, True, False)
    *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, padded, *no_dropout_state(query), 0.0, wanted, is_causal, scale=scaling
    )
    return tuple(grads)


def no_dropout_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """Placeholder seed and offset: no dropout is applied.

    The seed and offset that the forward pass returns are not used: they are CPU tensors, and
    inductor expects them on the GPU.
    """
    return query.new_zeros((), dtype=torch.long), query.new_zeros((), dtype=torch.long)


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
