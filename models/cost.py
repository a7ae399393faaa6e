"""What a model costs: its parameters, and the operations of a token beside what a device can do."""

import torch

from .config import SinkGPTNeoXConfig

# Dense 16-bit matrix throughput without sparsity, in FLOP/s, from NVIDIA's data sheets. The longest name that occurs
# in the device's name counts.
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
    """Parameters of a model with untied embeddings, its arm's included; sink tokens are rows of the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 3 * hidden * hidden + 3 * hidden + hidden * hidden + hidden
    mlp = 2 * hidden * inner + inner + hidden
    arm = {"logit": config.num_attention_heads, "kv_bias": 2 * hidden, "gate": hidden * hidden}.get(config.sink_kind, 0)
    per_layer = attention + arm + mlp + 4 * hidden  # two layer norms
    return config.num_hidden_layers * per_layer + 2 * config.vocab_size * hidden + 2 * hidden


def flops_per_token(config: SinkGPTNeoXConfig, seq_length: int) -> float:
    """Operations of one position's forward and backward pass: ``6 (N - V D) + 12 L D T``.

    N parameters without the V × D input embedding, which multiplies nothing; L layers of width D, T positions. The
    count is PaLM's (Chowdhery et al. 2022, appendix B): attention is counted in full, as if it were not causal, and
    recomputation is not counted.
    """
    multiplied = count_parameters(config) - config.vocab_size * config.hidden_size
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * seq_length


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense 16-bit throughput in FLOP/s; None where it is not known, on CPUs and for float32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_FLOPS if key in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None
