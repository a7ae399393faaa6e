"""Estimates the memory of training on each GPU, by ZeRO stage."""

from dataclasses import dataclass

from ..models import SinkGPTNeoXConfig
from ..models.cost import count_parameters
from ..models.loss import TOKENS_PER_CHUNK
from .config import TrainingConfig
from .engine import groups_of
from .only_sinks import count_frozen_parameters

GIB = 2**30


def size_text(num_bytes: float) -> str:
    """Return a number of bytes in GiB, or in MiB if it is small."""
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU: ``states`` (weights, gradients, optimizer) and ``activations``."""

    states: float
    activations: float


def estimate_memory(
    config: TrainingConfig, model: SinkGPTNeoXConfig, *, zero_stage: int, world_size: int, is_compiled: bool = False
) -> MemoryEstimate:
    """Estimate the peak memory of each GPU.

    States, in bytes per parameter over N ranks, in DeepSpeed 0.19 with float32 gradient
    accumulation:

    ===== ==================================== ===============================
    stage 16-bit                               float32
    ===== ==================================== ===============================
    0     4 weights + 4 gradients + 8 AdamW    the same
    1     2 + 2 + 4 (accumulated) + 12 / N     4 + 4 + 16 / N
    2     2 + 2 + (4 + 12) / N                 4 + 4 + 16 / N
    3     2 + (2 + 4 + 12) / N                 4 + (4 + 16) / N
    ===== ==================================== ===============================

    12 is a float32 copy of the weights and AdamW's two moments; 16 adds a copy of the gradients
    during clipping. Muon's matrices have one moment, and need 4 bytes less (4 / N with ZeRO).
    Frozen weights (``train.only_sinks``, stage 0) have neither gradients nor moments, 12 bytes
    less. The first terms of stages 2 and 3 are upper bounds: gradients are freed after their bucket
    is reduced, weights after their layer.

    Activations in 16 bits: ``36 B T D`` bytes per layer, and ``4 B T D`` more for a gate (its value
    and its output), ``2 B T D`` for gates of heads (their output). With activation checkpointing,
    each layer stores only its input, and one layer at a time stores everything. Float32 doubles
    these sizes. (Korthikanti et al. 2022, equation 2, have 34 per layer without the attention
    matrix, which the kernels do not store.) Logits exist for 8192 tokens at a time
    (`sinklm.models.loss`), with their gradient and, in an eager model, two float32 copies. The
    head's gradient is accumulated in float32. With ``train.segment_length`` T is the length of a
    segment, and the keys and values of the windows are added.

    ``train.precision: fp8`` is estimated as bf16. The float8 inputs that it keeps for the backward
    pass in place of 16-bit ones are not included (eager on a CPU, 30 bytes in place of 35).

    The factor 36 fits the peaks that PyTorch reported on one H100 (torch 2.11, ZeRO-1, bf16) to
    6 %: for compiled Pythia-160M at micro-batch 32 the estimate is 24.9 GiB, and 23.6 GiB were
    measured.
    """
    bytes_per_value = 4 if config.train.precision == "fp32" else 2
    states = count_parameters(model) * _bytes_per_parameter(zero_stage, bytes_per_value, world_size)
    states -= 4 * count_muon_parameters(config, model) / (world_size if zero_stage else 1)
    states -= 12 * count_frozen_parameters(config, model)

    segment_length = config.train.segment_length or config.train.seq_length
    positions = config.train.micro_batch_size * segment_length
    per_value = 36 + {"gate": 4, "head_gate": 2}.get(model.sink_kind, 0)
    layer = positions * model.hidden_size * per_value * bytes_per_value / 2
    if config.train.activation_checkpointing:
        kept = model.num_hidden_layers * positions * model.hidden_size * bytes_per_value + layer
    else:
        kept = model.num_hidden_layers * layer
    per_logit = 2 * bytes_per_value + (8 if bytes_per_value == 2 and not is_compiled else 0)
    head = model.vocab_size * (min(positions, TOKENS_PER_CHUNK) * per_logit + 4 * model.hidden_size)
    if segment_length < config.train.seq_length:  # the carried keys and values
        num_carried = config.train.micro_batch_size * sum(window or 0 for window in model.layer_windows or [])
        kept += 2 * num_carried * model.hidden_size * bytes_per_value
    return MemoryEstimate(states=states, activations=kept + head)


def count_muon_parameters(config: TrainingConfig, model: SinkGPTNeoXConfig) -> int:
    """Count the parameters that Muon updates: the matrices of all layers, or 0 with AdamW."""
    if config.optimizer.name != "muon":
        return 0
    return sum(parameter.numel() for parameter in groups_of(model, config)[0].values())


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
