"""Formats in which models are quantized: names and what they are, without the libraries."""

from dataclasses import dataclass

GROUP_SIZE = 32  # of int4 weights


@dataclass(frozen=True)
class Format:
    """A way of quantizing a model. ``kv_dtype`` is that of a streaming cache."""

    title: str
    description: str
    weights: str | None = None
    activations: str | None = None  # "token" or "tensor": what has one scale
    kv_dtype: str | None = None


FORMATS = {
    "w8": Format("weights int8", "weights int8, symmetric, a scale for each output", "int8"),
    "w4": Format("weights int4", f"weights int4, asymmetric, in groups of {GROUP_SIZE} inputs", "int4"),
    "w8a8-token": Format(
        "weights and activations int8, per token", "as w8, and inputs int8, symmetric, a scale for each token",
        "int8", "token",
    ),
    "w8a8-tensor": Format(
        "weights and activations int8, per tensor", "as w8, and inputs int8, symmetric, one scale for a sample",
        "int8", "tensor",
    ),
    "kv8": Format(
        "keys and values int8", "cache with kv_dtype int8; the last 32 tokens are not quantized", kv_dtype="int8"
    ),
}  # fmt: skip
