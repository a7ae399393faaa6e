"""The model families that can stream, one line each, and why others cannot.

Most families call transformers' attention interface, and their positions are rotary: nothing is needed but where their
frequencies are. Falcon, MPT and GPT-J compute attention in code of their own: `adapters` has a substitute for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.falcon.modeling_falcon import FalconModel, build_alibi_tensor
from transformers.models.gptj.modeling_gptj import GPTJModel
from transformers.models.mpt.modeling_mpt import MptModel

from . import adapters
from .encodings import Alibi, Encoding, Rotary
from .rule import StreamShape

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def shared_rotary(decoder: Any, shape: StreamShape) -> Rotary:
    """The rotary embedding that a decoder shares between its layers, over the two halves of a head or a part of it."""
    module: Any = decoder.rotary_emb
    rope_type = getattr(module, "rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise ValueError(
            f"cannot stream rope_type {rope_type!r}: its frequencies change with the length of the text, so that keys "
            f"already written cannot be moved; supported are {', '.join(FIXED_ROPE_TYPES)}"
        )
    return Rotary(lambda: module.inv_freq)


def gptj_rotary(decoder: GPTJModel, shape: StreamShape) -> Rotary:
    """Neighbouring pairs, frequencies from a table in every layer."""
    num_dims = decoder.config.rotary_dim or decoder.config.hidden_size
    dims = torch.arange(0, num_dims, 2, dtype=torch.float64, device=decoder.device)
    inv_freq = 10000 ** (-dims / num_dims)
    return Rotary(lambda: inv_freq, interleaved=True)


def falcon_encoding(decoder: FalconModel, shape: StreamShape) -> Encoding:
    """Falcon 7B and 40B are rotary, Falcon-RW has biases: as the model computes them, rounded to bfloat16."""
    if not decoder.config.alibi:
        return shared_rotary(decoder, shape)
    num_heads, head_dim = decoder.config.num_attention_heads, decoder.config.head_dim
    alibi = build_alibi_tensor(torch.ones(1, shape.num_slots, dtype=torch.long), num_heads, torch.float64)
    return Alibi(alibi[:, 0].to(decoder.device) / head_dim**0.5)


def mpt_alibi(decoder: MptModel, shape: StreamShape) -> Alibi:
    return Alibi(decoder.build_mpt_alibi_tensor(decoder.num_heads, shape.num_slots, device=decoder.device)[:, 0])


@dataclass(frozen=True)
class Family:
    """How a family encodes positions, and the substitute for attention code of its own."""

    encoding: Callable[[Any, StreamShape], Encoding]
    adapter: adapters.Adapter | None = None


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(shared_rotary),  # Pythia; a part of each head is rotary
    "sink_gpt_neox": Family(shared_rotary),
    "llama": Family(shared_rotary),
    "mistral": Family(shared_rotary),
    "qwen2": Family(shared_rotary),
    "qwen3": Family(shared_rotary),
    "gemma": Family(shared_rotary),
    "phi": Family(shared_rotary),
    "olmo": Family(shared_rotary),
    "olmo2": Family(shared_rotary),
    "falcon": Family(falcon_encoding, adapters.FALCON),
    "mpt": Family(mpt_alibi, adapters.MPT),
    "gptj": Family(gptj_rotary, adapters.GPTJ),
}

ABSOLUTE = (
    "its positions are absolute embeddings, which are added before the first layer and cannot be moved afterwards"
)
LINEAR = "it has no keys to keep: linear attention and state spaces hold their past in a state of fixed size"
LAYERED = "some of its layers attend to a sliding window by themselves, with rules that differ between layers"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt", "openai-gpt", "ctrl"), ABSOLUTE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "qwen3_next"), LINEAR),
    **dict.fromkeys(("jamba", "bamba", "falcon_h1", "zamba", "zamba2", "minimax"), LINEAR),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "cohere2", "olmo3", "gpt_oss"), LAYERED),
}


def num_embedded_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has that learns an embedding for each; None for the others, which have no end."""
    is_absolute = REFUSED.get(config.model_type) == ABSOLUTE
    return getattr(config, "max_position_embeddings", None) if is_absolute else None


def family_of(config: PreTrainedConfig, shape: StreamShape) -> Family:
    """The family of a model.

    Raises:
        ValueError: its positions cannot be moved, its own window is smaller than the cache, or it is not known here.
    """
    model_type = config.model_type
    if model_type in REFUSED:
        raise ValueError(f"cannot stream a model of type {model_type!r}: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"cannot stream a model of type {model_type!r}: nobody has checked that it keeps the streaming rule; "
            f"supported are {', '.join(FAMILIES)}"
        )
    own_window = sliding_window(config)
    if own_window is not None and own_window < shape.num_slots:
        raise ValueError(
            f"the model's own sliding window shows {own_window} keys and the cache would show {shape.num_slots}: "
            f"num_kept + window must be at most {own_window - 1}"
        )
    return FAMILIES[model_type]


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Keys that the model's own sliding-window layers see (Mistral 0.1, some Qwen), None if it has no such layers."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
