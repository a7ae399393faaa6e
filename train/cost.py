"""What a model costs: parameters, operations per token, and memory per GPU by ZeRO stage."""

from dataclasses import dataclass

import torch

from ..models import SinkGPTNeoXConfig
from ..models.loss import TOKENS_PER_CHUNK
from .config import TrainingConfig

GIB = 2**30

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU. ``states`` are weights, gradients and optimizer; ``activations`` one micro-batch's."""

    states: float
    activations: float


def estimate_memory(
    config: TrainingConfig, model: SinkGPTNeoXConfig, *, zero_stage: int, world_size: int, is_compiled: bool = False
) -> MemoryEstimate:
    """Estimate the peak memory of each GPU.

    States, in bytes per parameter over N ranks, as DeepSpeed 0.19 keeps them with float32 gradient accumulation:

    ===== ==================================== ===============================
    stage 16-bit                               float32
    ===== ==================================== ===============================
    0     4 weights + 4 gradients + 8 AdamW    the same
    1     2 + 2 + 4 (accumulated) + 12 / N     4 + 4 + 16 / N
    2     2 + 2 + (4 + 12) / N                 4 + 4 + 16 / N
    3     2 + (2 + 4 + 12) / N                 4 + (4 + 16) / N
    ===== ==================================== ===============================

    12 is a float32 copy of the weights and AdamW's two moments, 16 adds a copy of the gradients while they are
    clipped. The first terms of stage 2 and 3 are upper bounds: gradients live until their bucket is reduced, weights
    until their layer is done.

    Activations, in 16 bit: ``36 B T D`` bytes a layer, and 4 more for a gate: its own value, and what it lets through.
    With activation checkpointing a layer keeps its input alone, and one of them the whole. Float32 doubles it.
    (Korthikanti et al. 2022, equation 2, have 34 a layer without the attention matrix, which no kernel stores.) Logits
    exist for 8192 tokens at a time (`sinklm.models.loss`), with their gradient, and in an eager model two copies in
    float32. The head's own gradient is added up in float32.

    36 fits the peaks that PyTorch reported on one H100 (torch 2.11, ZeRO-1, bf16) to 6 %: compiled, Pythia-160M at
    micro-batch 32 is estimated at 24.9 GiB, and takes 23.6.
    """
    bytes_per_value = 4 if config.train.precision == "fp32" else 2
    states = count_parameters(model) * _bytes_per_parameter(zero_stage, bytes_per_value, world_size)

    positions = config.train.micro_batch_size * config.train.seq_length
    per_value = 36 + (4 if model.sink_kind == "gate" else 0)
    layer = positions * model.hidden_size * per_value * bytes_per_value / 2
    if config.train.activation_checkpointing:
        kept = model.num_hidden_layers * positions * model.hidden_size * bytes_per_value + layer
    else:
        kept = model.num_hidden_layers * layer
    per_logit = 2 * bytes_per_value + (8 if bytes_per_value == 2 and not is_compiled else 0)
    head = model.vocab_size * (min(positions, TOKENS_PER_CHUNK) * per_logit + 4 * model.hidden_size)
    return MemoryEstimate(states=states, activations=kept + head)


def _bytes_per_parameter(zero_stage: int, bytes_per_value: int, world_size: int) -> float:
    if zero_stage == 0:
        return 4 + 4 + 8
    shared, split = {
        (1, 2): (2 + 2 + 4, 12),
        (2, 2): (2 + 2, 4 + 12),
        (3, 2): (2, 2 + 4 + 12),
        (1, 4): (4 + 4, 16),
        (2, 4): (4 + 4, 16),
        (3, 4): (4, 4 + 16),
    }[zero_stage, bytes_per_value]
    return shared + split / world_size
