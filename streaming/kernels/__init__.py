"""Triton kernels of the decoding step.

Triton is part of torch's CUDA builds; without it `is_available` is False.
"""

try:
    from .attention import can_fuse, decode_attention
    from .matvec import OneRowLinear
    from .memory import BlockChoice
except ImportError:
    is_available = False
else:
    is_available = True

__all__ = ["BlockChoice", "OneRowLinear", "can_fuse", "decode_attention", "is_available"]
