"""The model families that support streaming, one line each, and why others do not.

Most families use transformers' attention interface and rotary positions, so only the location of
their frequencies is needed. Falcon, MPT and GPT-J have their own attention code; `adapters`
replaces it.
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
    """Return the rotary embedding that the layers of a decoder share; pairs are the two halves."""
    module: Any = decoder.rotary_emb
    rope_type = getattr(module, "rope_type", "default")
    if rope_type not in FIXED_ROPE_TYPES:
        raise ValueError(
            f"streaming does not support rope_type {rope_type!r}: its frequencies change with the length of the text, "
            f"so cached keys cannot be moved. Supported are {', '.join(FIXED_ROPE_TYPES)}"
        )
    return Rotary(lambda: module.inv_freq)


def gptj_rotary(decoder: GPTJModel, shape: StreamShape) -> Rotary:
    """Return GPT-J's rotary embedding: pairs of adjacent dimensions."""
    num_dims = decoder.config.rotary_dim or decoder.config.hidden_size
    dims = torch.arange(0, num_dims, 2, dtype=torch.float64, device=device_of(decoder))
    inv_freq = 10000 ** (-dims / num_dims)
    return Rotary(lambda: inv_freq, interleaved=True)


def falcon_encoding(decoder: FalconModel, shape: StreamShape) -> Encoding:
    """Return rotary embedding for Falcon 7B and 40B, ALiBi for Falcon-RW.

    ALiBi biases are rounded to bfloat16, as in the model.
    """
    if not decoder.config.alibi:
        return shared_rotary(decoder, shape)
    num_heads, head_dim = decoder.config.num_attention_heads, decoder.config.head_dim
    alibi = build_alibi_tensor(torch.ones(1, shape.num_slots, dtype=torch.long), num_heads, torch.float64)
    return Alibi(alibi[:, 0].to(device_of(decoder)) / head_dim**0.5)


def mpt_alibi(decoder: MptModel, shape: StreamShape) -> Alibi:
    return Alibi(decoder.build_mpt_alibi_tensor(decoder.num_heads, shape.num_slots, device=device_of(decoder))[:, 0])


def device_of(decoder: Any) -> torch.device:
    """Return the device of a decoder's first weights, the CPU if accelerate has offloaded them."""
    return torch.device("cpu") if decoder.device.type == "meta" else decoder.device


@dataclass(frozen=True)
class Family:
    """A family's position encoding, and the adapter for its attention code if it needs one."""

    encoding: Callable[[Any, StreamShape], Encoding]
    adapter: adapters.Adapter | None = None


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(shared_rotary),  # Pythia; only part of each head is rotary
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

ABSOLUTE = "it adds absolute position embeddings before the first layer, so positions of cached keys cannot be moved"
LINEAR = "it has no keys to keep: linear attention and state-space layers store their past in a state of fixed size"
LAYERED = "some of its layers have their own sliding window, with rules that differ between layers"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt", "openai-gpt", "ctrl"), ABSOLUTE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "qwen3_next"), LINEAR),
    **dict.fromkeys(("jamba", "bamba", "falcon_h1", "zamba", "zamba2", "minimax"), LINEAR),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "cohere2", "olmo3", "gpt_oss"), LAYERED),
}


def num_embedded_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model with absolute position embeddings, else None."""
    is_absolute = REFUSED.get(config.model_type) == ABSOLUTE
    return getattr(config, "max_position_embeddings", None) if is_absolute else None


def family_of(config: PreTrainedConfig, shape: StreamShape) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the model type is not supported, or the model's own sliding window is smaller
            than the cache.
    """
    model_type = config.model_type
    if model_type in REFUSED:
        raise ValueError(f"streaming does not support model type {model_type!r}: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"streaming does not support model type {model_type!r}: it was not tested with the streaming rule. "
            f"Supported are {', '.join(FAMILIES)}"
        )
    own_window = sliding_window(config)
    if own_window is not None and own_window < shape.num_slots:
        raise ValueError(
            f"the model's own sliding window has {own_window} keys, fewer than the {shape.num_slots} keys of this "
            f"cache (num_kept + window + 1): num_kept + window must be at most {own_window - 1}"
        )
    return FAMILIES[model_type]


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return the model's own sliding window in keys (Mistral 0.1, some Qwen), None without one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
