"""The model families whose positions a stream can move, one line each, and why others are refused."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .contract import StreamShape
from .encodings import Alibi, Rotary

Encoding = Rotary | Alibi


@dataclass(frozen=True)
class Family:
    """How a family encodes positions."""

    encoding: Callable[[PreTrainedModel, StreamShape], Encoding]


def rotary(base_model: PreTrainedModel, shape: StreamShape) -> Rotary:
    """The rotary embedding that the base model shares between its layers, in two halves."""
    module: nn.Module = base_model.rotary_emb
    rope_type = getattr(module, "rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise ValueError(
            f"cannot stream rope_type {rope_type!r}: its frequencies change with the length of the text, and keys that "
            f"were written with other frequencies cannot be moved; supported are {', '.join(FIXED_ROPE_TYPES)}"
        )
    return Rotary(lambda: module.inv_freq)


FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(rotary),  # Pythia; a part of each head is rotary
    "sink_gpt_neox": Family(rotary),
    "llama": Family(rotary),
    "mistral": Family(rotary),
    "qwen2": Family(rotary),
    "qwen3": Family(rotary),
    "gemma": Family(rotary),
    "phi": Family(rotary),
    "olmo": Family(rotary),
    "olmo2": Family(rotary),
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises:
        ValueError: its positions cannot be moved, or nobody has checked that they can.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"cannot stream a model of type {model_type!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
