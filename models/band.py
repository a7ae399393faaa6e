"""Attention over a band of keys, forward and backward, on CUDA in half precision.

FlashAttention computes every band. Where NVIDIA's package ``nvidia-cudnn-frontend`` is installed,
cuDNN computes those it is faster for (docs/windows.md has the times); PyTorch itself calls cuDNN
without windows only.

The functions take states ``(B, T, H, D)``. T queries are those of the last T of K keys, and query t
sees the keys ``K - T + t - window … K - T + t``.
"""

from functools import cache

import torch
from torch import Tensor

from .fused_attention import no_dropout_state

aten = torch.ops.aten


def band_forward(
    query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float, *, is_drawn: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute attention over the band.

    Args:
        is_drawn: the window changes from call to call.

    Returns:
        The output ``(B, T, H, D)`` and the log-sum-exp ``(B, H, T)``, both contiguous.
    """
    if not is_drawn and can_cudnn(query, key):
        heads_first = (states.transpose(1, 2) for states in (query, key, value))
        out, lse = torch.ops.cudnn.sdpa_fwd(*heads_first, scaling, is_causal=True, window_left=window + 1)
        return out.transpose(1, 2).contiguous(), lse[..., 0].contiguous()
    lengths = (None, None, query.shape[1], key.shape[1])
    band = {"scale": scaling, "window_size_left": window, "window_size_right": 0}
    out, lse, *_ = aten._flash_attention_forward(query, key, value, *lengths, 0.0, False, False, **band)
    return out.contiguous(), lse.contiguous()


def band_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    scaling: float,
    *,
    is_drawn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the band's part of the gradients of query, key and value, contiguous.

    Args:
        out, lse: of the whole softmax, which may have more keys than the band.
        is_drawn: the window changes from call to call.
    """
    if not is_drawn and can_cudnn(query, key):
        heads_first = (states.transpose(1, 2) for states in (grad, query, key, value, out))
        grads = torch.ops.cudnn.sdpa_bwd(*heads_first, lse[..., None], scaling, is_causal=True, window_left=window + 1)
        return tuple(gradient.transpose(1, 2).contiguous() for gradient in grads)
    lengths = (None, None, query.shape[1], key.shape[1])
    band = {"scale": scaling, "window_size_left": window, "window_size_right": 0}
    states = (grad, query, key, value, out, lse)
    grads = aten._flash_attention_backward(*states, *lengths, 0.0, False, *no_dropout_state(query), **band)
    return tuple(gradient.contiguous() for gradient in grads)


def can_cudnn(query: Tensor, key: Tensor) -> bool:
    """Whether cuDNN is installed for this band, and is faster than FlashAttention.

    It makes a plan for each shape and window, which takes 0.1 s: too long for windows that are
    drawn. Its deterministic backward pass is slower than FlashAttention's, and so is the one for
    fewer queries than keys.
    """
    return (
        query.shape[1] == key.shape[1]
        and query.shape[-1] <= 128
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
        and has_cudnn()
    )


@cache
def has_cudnn() -> bool:
    """Whether the operators of ``nvidia-cudnn-frontend`` are installed."""
    try:
        import cudnn.sdpa.fwd.torch_op  # noqa: F401  registers them
    except ImportError:
        return False
    return True
