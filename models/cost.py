"""Cost of a model: number of parameters, FLOPs per token, and peak throughput of devices."""

import math
from collections.abc import Sequence

import torch

from .config import SinkGPTNeoXConfig

# Dense 16-bit matrix throughput without sparsity, in FLOP/s, from NVIDIA's data sheets. If several
# keys occur in a device's name, the longest one applies.
PEAK_FLOPS = {
    "V100": 125e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "RTX A6000": 154.8e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 6000 Ada": 364.2e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H20": 148e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}


def count_parameters(config: SinkGPTNeoXConfig) -> int:
    """Count the parameters of a model with untied embeddings, including those of its arm.

    Sink tokens are rows of the embedding.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden
    mlp = 2 * hidden * inner + inner + hidden
    arms = {
        "logit": config.num_attention_heads,
        "kv_bias": 2 * hidden,
        "gate": hidden * hidden,
        "head_gate": config.num_attention_heads * hidden,
    }
    per_layer = attention + arms.get(config.sink_kind, 0) + mlp + 4 * hidden  # two layer norms
    return config.num_hidden_layers * per_layer + 2 * config.vocab_size * hidden + 2 * hidden


def flops_per_token(config: SinkGPTNeoXConfig, seq_length: int, window: int | None = None) -> float:
    """FLOPs of the forward and backward pass of one position: ``6 (N - V D) + 12 D Σ K``.

    N is the number of parameters, V × D the size of the input embedding (a look-up without
    multiplications), and K the number of keys of a query in each layer of width D. The count
    follows PaLM (Chowdhery et al. 2022, appendix B): recomputation is not counted, and full
    attention is counted as if it were not causal, so K is ``seq_length``. In a layer with S kept
    tokens and a window W, K is at most S + W + 1.

    Args:
        window: W of a step that drew it; None: its mean over the draws if training draws it.
    """
    multiplied = count_parameters(config) - config.vocab_size * config.hidden_size
    drawn = config.window_range if window is None else (window, window)
    by_window = {own: _num_keys(config, own, drawn, seq_length) for own in set(config.windows)}
    return 6 * multiplied + 12 * config.hidden_size * sum(by_window[own] for own in config.windows)


def _num_keys(config: SinkGPTNeoXConfig, own: int | None, drawn: Sequence[int] | None, seq_length: int) -> float:
    """Return the number of keys of a query in a layer; for drawn windows, the mean over the draws.

    Window w has the probability ``log((w + 1) / w) / log((high + 1) / low)``. Over the windows that
    do not reach the length, the sum of ``w log((w + 1) / w)`` is telescoped.
    """
    if own is None:
        return seq_length
    others = (config.num_kept or 0) + 1
    low, high = drawn or (own, own)
    if low == high:
        return min(seq_length, others + low)
    last = min(high, seq_length - others)  # of the windows that do not reach the length
    if last < low:
        return seq_length
    share = math.log((last + 1) / low)
    windows = (last + 1) * math.log(last + 1) - low * math.log(low) - math.lgamma(last + 2) + math.lgamma(low + 1)
    return (others * share + windows + seq_length * math.log((high + 1) / (last + 1))) / math.log((high + 1) / low)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense 16-bit throughput of a device in FLOP/s; None if unknown, on CPUs and for float32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_FLOPS if key in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None
