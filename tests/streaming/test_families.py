"""Every supported family computes the streaming rule: the table of families in docs/streaming.md."""

import pytest
import torch
from transformers import AutoConfig

from sinklm.streaming.families import FAMILIES
from sinklm.streaming.testing import check_family, random_model

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
}
SETTINGS: dict[str, dict] = {
    "gpt_neox": {},
    "sink_gpt_neox": {"sink": {"kind": "kv_bias"}},
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "olmo2": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"max_seq_len": 32},
    "gptj": {"rotary_dim": 4, "n_positions": 24, "n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "ministral3": {"head_dim": 8, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "phi3": {"sliding_window": 7},
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "olmoe": EXPERTS,
    "granite": {"attention_multiplier": 0.4, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "granitemoe": {
        "num_local_experts": 4,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "starcoder2": {"sliding_window": 7},
    "glm4_moe": DEEPSEEK | {"num_key_value_heads": 2, "head_dim": 8, "partial_rotary_factor": 0.5, "use_qk_norm": True},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "arcee": {},
    "apertus": {},
    "seed_oss": {"head_dim": 8},
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "helium": {"head_dim": 8},
    "cohere": {"use_qk_norm": True},
    "stablelm": {"partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 8},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 24, "n_inner": 48},
    "bloom": {"n_layer": 2, "n_head": 4},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "exaone4": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {
        "head_dim": 8,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 7,
        "floor_scale": 15,
        "attn_temperature_tuning": True,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "moe_layers": [1],
    },
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
}


def config(model_type: str, **overrides):
    return AutoConfig.for_model(model_type, **SMALL | SETTINGS[model_type] | overrides)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_family(model_type):
    check_family(random_model(config(model_type)))


def test_all_families_are_tested():
    assert set(SETTINGS) == set(FAMILIES)
