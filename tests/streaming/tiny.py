"""Small random models with sharp attention, and a way to compute their phases in float64."""

from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCAB = 101


def config(name: str, **overrides) -> PreTrainedConfig:
    """Return a small config of a family; ``family:variant`` selects a variant."""
    family, _, variant = name.partition(":")
    return AutoConfig.for_model(family, **COMMON | VARIANTS[family][variant] | overrides)


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
GROUPED = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LOCAL = {  # a windowed layer with a rotary base of its own, and a full one
    "head_dim": 16,
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
}
VARIANTS: dict[str, dict[str, dict]] = {
    "gpt_neox": {"": {}, "sequential": {"use_parallel_residual": False}},
    "llama": {
        "": GROUPED,
        "llama3": GROUPED | {"rope_parameters": LLAMA3},
        "yarn": GROUPED | {"rope_parameters": YARN},
        "linear": GROUPED | {"rope_parameters": LINEAR},
    },
    "mistral": {"": GROUPED | {"sliding_window": None}, "sliding": GROUPED | {"sliding_window": 14}},
    "qwen2": {"": GROUPED},
    "qwen3": {"": GROUPED | {"head_dim": 16}},
    "gemma": {"": {"num_key_value_heads": 1, "head_dim": 16}},
    "gemma3_text": {"": GROUPED | LOCAL},
    "olmo": {"": GROUPED},
    "olmo2": {"": GROUPED},
    "phi": {"": {"partial_rotary_factor": 0.5}},
    "gptj": {
        "": {
            "rotary_dim": 8,
            "n_positions": 24,
            "n_inner": 96,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    },
    "mpt": {"": {"max_seq_len": 32}},
    "falcon": {
        "": {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},  # 7B
        "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "rw": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    },
}
FAMILIES = [f"{family}:{variant}".rstrip(":") for family, variants in VARIANTS.items() for variant in variants]


def build(cfg, seed: int = 0, dtype=torch.float64):
    """Return a model with large weights: attention is sharp, so a misplaced key has an effect."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def use_float64(model) -> None:
    """Make a model compute in float64 where transformers always uses float32."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    for layer_type in getattr(rotary, "layer_types", ()):
        setattr(rotary, f"{layer_type}_inv_freq", inverse_frequencies(model.config, layer_type))
        rotary.forward = partial(float64_tables, rotary)
    if hasattr(rotary, "inv_freq"):
        rotary.inv_freq = inverse_frequencies(model.config)
        rotary.forward = partial(float64_tables, rotary)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            one = 1 if type(module).__name__.startswith("Gemma") else 0
            module.forward = partial(float64_rms_norm, module, one)
        if type(module).__name__ == "OlmoLayerNorm":
            module.forward = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)


def float64_tables(rotary, x, position_ids, layer_type=None):
    prefix = "" if layer_type is None else f"{layer_type}_"
    angles = position_ids[..., None].double() * getattr(rotary, f"{prefix}inv_freq")
    angles = torch.cat((angles, angles), dim=-1)
    scaling = getattr(rotary, f"{prefix}attention_scaling")
    return angles.cos() * scaling, angles.sin() * scaling


def float64_rms_norm(module, one, x):
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return (one + module.weight) * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())


def inverse_frequencies(cfg, layer_type: str | None = None) -> torch.Tensor:
    """Return rotary frequencies in float64 (scaled types: float32 values of transformers)."""
    rope = cfg.rope_parameters if layer_type is None else cfg.rope_parameters[layer_type]
    if rope["rope_type"] != "default":
        of_type = {} if layer_type is None else {"layer_type": layer_type}
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](cfg, torch.device("cpu"), **of_type)[0].double()
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return rope["rope_theta"] ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def random_ids(num_tokens: int, batch_size: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))
