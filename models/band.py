"""Attention over a band of keys, forward and backward, on CUDA in half precision.

FlashAttention computes every band. cuDNN is faster for those that `can_cudnn` names
(docs/results/windows-speed.md). PyTorch calls cuDNN without windows only, so it requires NVIDIA's
package ``nvidia-cudnn-frontend``.

The functions take states ``(B, T, H, D)``. T queries are those of the last T of K keys, and query t
sees the keys ``K - T + t - window … K - T + t``.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..text import one_line
from .fused_attention import no_dropout_state

aten = torch.ops.aten


def band_forward(
    query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float, by_cudnn: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention over the band.

    Args:
        by_cudnn: use cuDNN if it is installed; requires `can_cudnn`.

    Returns:
        The output ``(B, T, H, D)`` and the log-sum-exp ``(B, H, T)``, both contiguous.
    """
    if by_cudnn and has_cudnn():
        heads_first = (states.transpose(1, 2) for states in (query, key, value))
        out, lse = torch.ops.cudnn.sdpa_fwd(*heads_first, scaling, is_causal=True, window_left=window + 1)
        return out.transpose(1, 2).contiguous(), lse[..., 0].contiguous()
    lengths, band = _flash_band(query, key, window, scaling)
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
    by_cudnn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the band's part of the gradients of query, key and value, contiguous.

    Args:
        out, lse: of the whole softmax, which may have more keys than the band.
        by_cudnn: use cuDNN if it is installed; requires `can_cudnn`.
    """
    if by_cudnn and has_cudnn():
        heads_first = (states.transpose(1, 2) for states in (grad, query, key, value, out))
        grads = torch.ops.cudnn.sdpa_bwd(*heads_first, lse[..., None], scaling, is_causal=True, window_left=window + 1)
        return tuple(gradient.transpose(1, 2).contiguous() for gradient in grads)
    states, (lengths, band) = (grad, query, key, value, out, lse), _flash_band(query, key, window, scaling)
    grads = aten._flash_attention_backward(*states, *lengths, 0.0, False, *no_dropout_state(query), **band)
    return tuple(gradient.contiguous() for gradient in grads)


def _flash_band(query: Tensor, key: Tensor, window: int, scaling: float) -> tuple[tuple, dict]:
    """Return the positional and the keyword arguments that FlashAttention's two passes share."""
    lengths = (None, None, query.shape[1], key.shape[1])
    return lengths, {"scale": scaling, "window_size_left": window, "window_size_right": 0}


def can_cudnn(query: Tensor, key: Tensor) -> bool:
    """Whether cuDNN supports this band, and is faster than FlashAttention.

    That is so in training on H100 and H200. cuDNN makes a plan for each shape and window, which
    takes 0.1 s: too long for windows that are drawn, and for prompts of any length. It is slower
    than FlashAttention if it has to be deterministic, and if there are fewer queries than keys.
    """
    if query.device.type != "cuda" or not (torch.is_grad_enabled() and query.requires_grad):
        return False
    device = torch.cuda.get_device_properties(query.device)
    is_supported = query.shape[1] == key.shape[1] and query.shape[-1] <= 128
    return is_supported and (device.major, device.minor) == (9, 0) and not torch.are_deterministic_algorithms_enabled()


@cache
def has_cudnn() -> bool:
    """Whether the operators of ``nvidia-cudnn-frontend`` can be used."""
    if find_spec("cudnn") is None:
        return False
    try:
        import cudnn.sdpa.fwd.torch_op  # noqa: F401  registers them
    except Exception as error:  # for example a library of CUDA that is missing
        warnings.warn(
            f"nvidia-cudnn-frontend cannot be used, so FlashAttention computes windows: {one_line(error)}", stacklevel=2
        )
        return False
    return True
