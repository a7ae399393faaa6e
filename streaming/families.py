"""The model families that support streaming, one line each, and why others do not.

Most families use transformers' attention interface and rotary positions, so only the location of
their frequencies is needed. `adapters` replaces the attention code of the others.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as build_bloom_alibi
from transformers.models.falcon.modeling_falcon import FalconModel
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as build_falcon_alibi
from transformers.models.mpt.modeling_mpt import MptModel

from . import adapters
from .encodings import Alibi, Encoding, Rotary
from .layers import known_setting, layer_shapes
from .refusals import ABSOLUTE, REFUSED, refusal
from .rule import LARGEST, StreamShape

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
SWITCHING_ROPE_TYPES = ("dynamic", "longrope")  # fixed up to a length, see `num_equal_positions`


def shared_rotary(
    decoder: Any,
    shape: StreamShape,
    *,
    interleaved: bool = False,
    start: int = 0,
    layers: Container[int] | None = None,
) -> Rotary:
    """Return the rotary embedding that the layers of a decoder share, ``decoder.rotary_emb``.

    Further arguments are those of `Rotary`.
    """
    return Rotary(frequencies(decoder.rotary_emb), interleaved=interleaved, start=start, layers=layers)


def frequencies(module: Any, layer_type: str | None = None) -> Callable[[], Tensor]:
    """Return a function that returns the frequencies of a rotary embedding, or of a type of layers.

    Raises:
        ValueError: the rotary type was not tested.
    """
    rope_type = getattr(module, "rope_type", "default")
    if isinstance(rope_type, dict):
        rope_type = rope_type[layer_type]
    if rope_type not in FIXED_ROPE_TYPES + SWITCHING_ROPE_TYPES:
        raise ValueError(
            f"streaming does not support rope_type {rope_type!r}: it was not tested with the streaming rule. "
            f"Supported are {', '.join(FIXED_ROPE_TYPES + SWITCHING_ROPE_TYPES)}"
        )
    name = "original_inv_freq" if rope_type in SWITCHING_ROPE_TYPES else "inv_freq"
    return lambda: getattr(module, name if layer_type is None else f"{layer_type}_{name}")


def rotary_by_layer_type(decoder: Any, shape: StreamShape, *, interleaved: bool = False) -> list[Rotary]:
    """Return the rotary embedding of each layer, for types of layers with a base of their own.

    Windowed layers of Gemma 3 have another base than the others. A type without frequencies has no
    positions.
    """
    types, module = decoder.config.layer_types, decoder.rotary_emb
    embeddings = {name: Rotary(frequencies(module, name), interleaved=interleaved) for name in dict.fromkeys(types)}
    return [embeddings[name] for name in types]


def rotary_by_layer_base(decoder: Any, shape: StreamShape) -> list[Rotary]:
    """Return the rotary embedding of each layer, for layers with a base of their own (Granite SWA).

    Layers with base 0 have no positions.
    """
    embeddings = {each.config.rope_parameters["rope_theta"]: Rotary(frequencies(each)) for each in decoder.rotary_embs}
    embeddings[0] = shared_rotary(decoder, shape, layers=())
    return [embeddings[base] for base in decoder.config.layer_rope_theta]


def latent_rotary(decoder: Any, shape: StreamShape, *, interleaved: bool = False) -> Rotary:
    """Return the rotary embedding of multi-head latent attention (DeepSeek): the last dimensions.

    The first dimensions come from the latent and have no position.
    """
    return shared_rotary(decoder, shape, interleaved=interleaved, start=decoder.config.qk_nope_head_dim)


def rotary_in_some_layers(decoder: Any, shape: StreamShape, *, interleaved: bool = False) -> Rotary:
    """Return a rotary embedding for layers of which some have no positions (SmolLM3, Llama 4)."""
    layers = {i for i, is_rotary in enumerate(decoder.config.no_rope_layers) if is_rotary}
    return shared_rotary(decoder, shape, interleaved=interleaved, layers=layers)


def rotary_in_windowed_layers(decoder: Any, shape: StreamShape, *, interleaved: bool = False) -> Rotary:
    """Return a rotary embedding of layers with a window; the others have no positions (Cohere 2).

    If the model has no window, all layers are rotated (EXAONE 4).
    """
    config = decoder.config
    if config.sliding_window is None:
        return shared_rotary(decoder, shape, interleaved=interleaved)
    layers = {i for i, layer_type in enumerate(config.layer_types) if layer_type == "sliding_attention"}
    return shared_rotary(decoder, shape, interleaved=interleaved, layers=layers)


def gptj_rotary(decoder: Any, shape: StreamShape) -> Rotary:
    """Return the rotary embedding of GPT-J and CodeGen: pairs of adjacent dimensions."""
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
    alibi = build_falcon_alibi(torch.ones(1, shape.num_slots, dtype=torch.long), num_heads, torch.float64)
    return Alibi(alibi[:, 0].to(device_of(decoder)) / head_dim**0.5)


def mpt_alibi(decoder: MptModel, shape: StreamShape) -> Alibi:
    return Alibi(decoder.build_mpt_alibi_tensor(decoder.num_heads, shape.num_slots, device=device_of(decoder))[:, 0])


def device_of(decoder: Any) -> torch.device:
    """Return the device of a decoder's first weights, the CPU if accelerate has offloaded them."""
    return torch.device("cpu") if decoder.device.type == "meta" else decoder.device


def bloom_alibi(decoder: Any, shape: StreamShape) -> Alibi:
    if decoder.config.slow_but_exact and decoder.config.pretraining_tp > 1:
        raise ValueError(
            "streaming does not support BLOOM with slow_but_exact and pretraining_tp > 1, which leaves out the bias "
            "of the attention's output: load the model with slow_but_exact=False"
        )
    ones = torch.ones(1, shape.num_slots, dtype=torch.long, device=device_of(decoder))
    return Alibi(build_bloom_alibi(ones, decoder.num_heads, torch.float32)[:, 0])


EncodingOf = Callable[[Any, StreamShape], Encoding | Sequence[Encoding]]


@dataclass(frozen=True)
class Family:
    """A family's position encoding, and the adapter for its attention code if it needs one.

    Args:
        encoding: maps ``(decoder, shape)`` to the encoding of all layers, or to one for each layer.
    """

    encoding: EncodingOf
    adapter: adapters.Adapter | None = None


ROTARY = Family(shared_rotary)
INTERLEAVED = Family(partial(shared_rotary, interleaved=True))
SOME_LAYERS = Family(rotary_in_some_layers)
LATENT = Family(latent_rotary)
BY_TYPE = Family(rotary_by_layer_type)
BY_BASE = Family(rotary_by_layer_base)
WINDOWED_ROTARY = Family(rotary_in_windowed_layers)
FAMILIES: dict[str, Family] = {
    "gpt_neox": ROTARY,  # Pythia; only part of each head is rotary
    "sink_gpt_neox": ROTARY,
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": ROTARY,
    "gemma": ROTARY,
    "phi": ROTARY,
    "olmo": ROTARY,
    "olmo2": ROTARY,
    "falcon": Family(falcon_encoding, adapters.FALCON),
    "mpt": Family(mpt_alibi, adapters.MPT),
    "gptj": Family(gptj_rotary, adapters.GPTJ),
    "mixtral": ROTARY,
    "ministral3": ROTARY,
    "qwen2_moe": ROTARY,
    "qwen3_moe": ROTARY,
    "phi3": ROTARY,
    "phimoe": ROTARY,
    "olmoe": ROTARY,
    "granite": ROTARY,
    "granitemoe": ROTARY,
    "starcoder2": ROTARY,
    "glm4_moe": ROTARY,
    "arcee": ROTARY,
    "apertus": ROTARY,
    "seed_oss": ROTARY,
    "glm": INTERLEAVED,
    "glm4": INTERLEAVED,
    "ernie4_5": INTERLEAVED,
    "ernie4_5_moe": INTERLEAVED,
    "helium": INTERLEAVED,
    "cohere": INTERLEAVED,
    "stablelm": Family(shared_rotary, adapters.OWN),
    "nemotron": Family(shared_rotary, adapters.OWN),
    "codegen": Family(gptj_rotary, adapters.CODEGEN),
    "bloom": Family(bloom_alibi, adapters.BLOOM),
    "smollm3": SOME_LAYERS,
    "exaone4": WINDOWED_ROTARY,
    "exaone_moe": WINDOWED_ROTARY,
    "afmoe": WINDOWED_ROTARY,
    "cohere2": Family(partial(rotary_in_windowed_layers, interleaved=True)),
    "cohere2_moe": Family(partial(rotary_in_windowed_layers, interleaved=True)),
    "gemma2": ROTARY,
    "gemma3_text": BY_TYPE,
    "gemma3n_text": BY_TYPE,
    "gemma4_text": BY_TYPE,
    "vaultgemma": ROTARY,
    "modernbert-decoder": BY_TYPE,
    "gpt_oss": ROTARY,
    "olmo3": BY_TYPE,
    "ministral": ROTARY,
    "cwm": ROTARY,
    "mimo_v2_flash": BY_TYPE,
    "mellum": BY_TYPE,
    "laguna": BY_TYPE,
    "granite_swa": BY_BASE,
    "granitemoe_swa": BY_BASE,
    "dots1": ROTARY,
    "llama4_text": Family(partial(rotary_in_some_layers, interleaved=True), adapters.OWN),
    "deepseek_v2": Family(partial(latent_rotary, interleaved=True)),
    "deepseek_v3": LATENT,
}


def register_family(model_type: str, encoding: EncodingOf, adapter: adapters.Adapter | None = None) -> None:
    """Let models of another type stream.

    Check a model of the type with `sinklm.streaming.testing.check_family`: a wrong encoding gives
    wrong text without an error.

    Args:
        model_type: as in the config of the decoder, the model without its head.
        encoding: maps ``(decoder, shape)`` to the positions of the decoder's keys: `shared_rotary`
            for most models, `rotary_by_layer_type`, or a function that returns `Rotary` or `Alibi`,
            or one of them for each layer.
        adapter: for attention code that does not use transformers' attention interface.

    Raises:
        ValueError: the type is supported already, or known to be impossible; or an argument is of
            the wrong type.
    """
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"model_type is {model_type!r}: pass the model_type of the decoder's config")
    if not callable(encoding):
        raise ValueError(f"encoding is {encoding!r}: pass a function of (decoder, shape), such as shared_rotary")
    if adapter is not None and not isinstance(adapter, adapters.Adapter):
        raise ValueError(f"adapter is {adapter!r}: pass a sinklm.streaming.adapters.Adapter, or None")
    if reason := refusal(model_type):
        raise ValueError(f"model type {model_type!r} cannot be registered for streaming: {reason}")
    if model_type in FAMILIES:
        raise ValueError(f"model type {model_type!r} is registered for streaming already: remove the second call")
    FAMILIES[model_type] = Family(encoding, adapter)


def num_embedded_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions if the model has a table of them, else None."""
    if config.model_type == "mpt":
        return config.max_seq_len
    is_absolute = REFUSED.get(config.model_type) == ABSOLUTE
    return getattr(config, "max_position_embeddings", None) if is_absolute else None


def family_of(config: PreTrainedConfig, shape: StreamShape) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the model type is not supported, or the model computes something else for
            caches of this size: its attention chunks are smaller, or its positions change.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        reason = refusal(model_type, config) or (
            "it was not tested with the streaming rule. To add it, see sinklm.streaming.register_family. "
            f"Supported are {', '.join(FAMILIES)}"
        )
        raise ValueError(f"streaming does not support model type {model_type!r}: {reason}")
    # "vision" (Gemma 4) is for the tokens of images only
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):
        raise ValueError(
            f"streaming does not support this model of type {model_type!r}: its tokens see later ones (is_causal=False "
            "or use_bidirectional_attention in its config), which have not been read in a stream"
        )
    if "chunked_attention" in (known_setting(config, "layer_types") or ()):
        num_keys = config.attention_chunk_size
        if num_keys < shape.num_slots:
            raise ValueError(
                f"the model's own attention chunks have {num_keys} keys, fewer than the {shape.num_slots} keys of this "
                f"cache (num_kept + window + 1): num_kept + window must be at most {num_keys - 1}"
            )
    shapes = layer_shapes(config, shape)
    num_used = max(own.num_slots for own in shapes) + max(own.window for own in shapes) + 1
    num_positions = num_equal_positions(config)
    if num_used > num_positions:
        raise ValueError(
            f"the model computes positions from {num_positions} on in another way, and this cache uses "
            f"{num_used}: num_kept + 2 * window must be at most {num_positions - 2}"
        )
    return FAMILIES[model_type]


def is_one_graph(decoder: Any) -> bool:
    """Whether a step can be compiled, which it cannot if it chooses its rotary frequencies."""
    rope_type = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    used = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return not set(used) & set(SWITCHING_ROPE_TYPES)


def num_equal_positions(config: PreTrainedConfig) -> int:
    """Return the number of positions that a model treats alike.

    From there on it changes its rotary frequencies (`dynamic`, `longrope`) or scales its queries
    (Ministral 3, Llama 4). Positions of a pass are below
    ``num_slots + max(window + 1, chunk_size)``.
    """
    limits = [LARGEST * 4]
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = [entry for entry in parameters.values() if isinstance(entry, dict)]
    for rope in by_type or [parameters]:
        if rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings - 1)
        if rope.get("rope_type") == "longrope" or rope.get("llama_4_scaling_beta"):
            limits.append(rope["original_max_position_embeddings"])
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(int(config.floor_scale) - 1)
    return min(limits)
