"""Kernels of the decoding step, in Triton, which comes with torch's CUDA builds; elsewhere `is_available` is False."""

try:
    from .attention import can_fuse, decode_attention
    from .matvec import OneRowLinear
except ImportError:
    is_available = False
else:
    is_available = True

__all__ = ["OneRowLinear", "can_fuse", "decode_attention", "is_available"]
