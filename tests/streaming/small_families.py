"""A small model of each supported family, and the table of families in docs/streaming.md.

``python -m tests.streaming.small_families`` checks all of them and writes the table.
"""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from sinklm.streaming.testing import check_family, random_model

PAGE = Path(__file__).parents[2] / "docs" / "streaming.md"
HEADER = "| family | `model_type` | positions | largest difference |\n|---|---|---|---|\n"
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
SHARED_EXPERT = {"first_k_dense_replace": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = ROUTED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
MULTIPLIERS = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "rotary_dim": 4, "n_positions": 24}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 15}  # caches of 6 use positions up to 14
LONGROPE = ROPE | {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
PART = {"head_dim": 8, "partial_rotary_factor": 0.5}
HALF = "rotary, a part of each head"

WINDOW = {"sliding_window": 3}  # a window smaller than that of each cache
EVERY = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
LOCAL = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
}
PER_LAYER = {  # the last two layers use the keys of the first two
    **WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 101,
}
MINISTRAL = {"head_dim": 8, "rope_parameters": ROPE | {"rope_type": "default", "llama_4_scaling_beta": 2.0}}
GEMMA = EVERY | {"head_dim": 8, "query_pre_attn_scalar": 5}
WINDOWS, SOME_WINDOWS = "rotary; windows", "rotary; windows in some layers"

# model_type, with a variant after a colon: the name and positions in the table, and settings
FAMILIES: dict[str, tuple[str, str, dict]] = {
    "gpt_neox": ("Pythia, GPT-NeoX", HALF, {}),
    "sink_gpt_neox": ("models of sinklm", HALF, {"sink": {"kind": "kv_bias"}}),
    "sink_gpt_neox:window": (
        "",
        f"{HALF}; windows in some layers",
        {"sink": {"kind": "logit"}, "layer_windows": [3, None], "num_kept": 2},
    ),
    "llama": ("Llama 1–3", "rotary", {}),
    "llama:dynamic": (
        "",
        "`dynamic`",
        {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "mistral": ("Mistral", "rotary", {"sliding_window": 7}),
    "mistral:window": ("", WINDOWS, WINDOW),
    "ministral": ("Ministral", SOME_WINDOWS, EVERY | {"head_dim": 8}),
    "mixtral": ("Mixtral", "rotary", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral:window": ("", WINDOWS, WINDOW | {"num_local_experts": 4}),
    "ministral3": ("Ministral 3", "rotary, queries scaled by position", MINISTRAL | {"sliding_window": None}),
    "ministral3:window": ("", f"{WINDOWS}, queries scaled by position", MINISTRAL | WINDOW),
    "llama4_text": (
        "Llama 4 (text)",
        "interleaved rotary, or none; queries scaled by position",
        {
            "head_dim": 8,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 7,
            "floor_scale": 15,
            "attn_scale": 2.0,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "moe_layers": [1],
        },
    ),
    "qwen2": ("Qwen2", "rotary", {}),
    "qwen2:window": ("", SOME_WINDOWS, QWEN_WINDOW),
    "qwen2_moe": ("Qwen2-MoE", "rotary", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen2_moe:window": ("", SOME_WINDOWS, QWEN_WINDOW | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", "rotary", {"head_dim": 16}),
    "qwen3:window": ("", SOME_WINDOWS, QWEN_WINDOW | {"head_dim": 16}),
    "qwen3_moe": ("Qwen3-MoE", "rotary", EXPERTS | {"head_dim": 8}),
    "qwen3_moe:window": ("", WINDOWS, QWEN_WINDOW | EXPERTS | {"head_dim": 8}),
    "gemma": ("Gemma 1", "rotary", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma 2", f"{SOME_WINDOWS}, capped scores", GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma 3 (text)", f"{SOME_WINDOWS} with their own base", GEMMA | LOCAL),
    "gemma3n_text": (
        "Gemma 3n (text)",
        f"{SOME_WINDOWS} with their own base, shared keys",
        PER_LAYER | {"laurel_rank": 4},
    ),
    "gemma4_text": (
        "Gemma 4 (text)",
        f"{SOME_WINDOWS} with their own base and head size, shared keys",
        PER_LAYER | {"global_head_dim": 16},
    ),
    "vaultgemma": ("VaultGemma", f"{SOME_WINDOWS}, capped scores", GEMMA | {"attn_logit_softcapping": 2.0}),
    "gpt_oss": (
        "gpt-oss",
        f"{SOME_WINDOWS}, sink logits",
        EVERY | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi": ("Phi-1, 1.5, 2", HALF, {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi-3, Phi-4", "rotary", {"sliding_window": 7}),
    "phi3:window": ("", WINDOWS, WINDOW),
    "phi3:longrope": (
        "",
        "`longrope`",
        {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 15},
    ),
    "phimoe": (
        "Phi-3.5-MoE",
        "rotary, `longrope`",
        {
            "num_local_experts": 4,
            "sliding_window": None,
            "rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.7},
        },
    ),
    "phimoe:window": ("", WINDOWS, WINDOW | {"num_local_experts": 4}),
    "olmo": ("OLMo", "rotary", {}),
    "olmo2": ("OLMo 2", "rotary", {}),
    "olmo3": ("OLMo 3", SOME_WINDOWS, EVERY),
    "olmoe": ("OLMoE", "rotary", EXPERTS),
    "granite": ("Granite", "rotary", MULTIPLIERS),
    "granitemoe": ("Granite-MoE", "rotary", MULTIPLIERS | {"num_local_experts": 4}),
    "granite_swa": (
        "Granite SWA",
        "rotary, a base for each layer; windows in some layers, sink logits",
        EVERY | MULTIPLIERS | {"layer_rope_theta": [100.0, 10000.0]},
    ),
    "granitemoe_swa": (
        "Granite-MoE SWA",
        "rotary, a base for each layer, or none; windows in some layers, sink logits",
        EVERY | MULTIPLIERS | {"num_local_experts": 4, "layer_rope_theta": [0.0, 100.0]},
    ),
    "starcoder2": ("StarCoder2", "rotary", {"sliding_window": 7}),
    "starcoder2:window": ("", WINDOWS, WINDOW),
    "glm": ("GLM", "interleaved rotary, a part of each head", PART),
    "glm4": ("GLM-4", "interleaved rotary, a part of each head", PART),
    "glm4_moe": ("GLM-4.5", HALF, ROUTED | PART | {"use_qk_norm": True}),
    "deepseek_v2": ("DeepSeek-V2", "interleaved rotary, beside the latent", LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepSeek-V3, R1", "rotary, beside the latent", LATENT),
    "ernie4_5": ("ERNIE 4.5", "interleaved rotary", {"head_dim": 8}),
    "ernie4_5_moe": (
        "ERNIE 4.5 MoE",
        "interleaved rotary",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "seed_oss": ("Seed-OSS", "rotary", {"head_dim": 8}),
    "arcee": ("Arcee", "rotary", {}),
    "apertus": ("Apertus", "rotary", {}),
    "helium": ("Helium", "interleaved rotary", {"head_dim": 8}),
    "cohere": ("Cohere (Command R)", "interleaved rotary", {"use_qk_norm": True}),
    "cohere2": ("Cohere 2 (Command R7B)", "interleaved rotary in windows, or none", EVERY | {"head_dim": 8}),
    "cohere2_moe": ("Cohere 2 MoE", "interleaved rotary in windows, or none", EVERY | EXPERTS | {"head_dim": 8}),
    "stablelm": ("StableLM", HALF, {"partial_rotary_factor": 0.5}),
    "nemotron": ("Nemotron", HALF, PART),
    "smollm3": ("SmolLM3", "rotary, or none", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "smollm3:window": (
        "",
        "rotary, or none; windows in some layers",
        EVERY | {"no_rope_layers": [1, 0], "use_sliding_window": True},
    ),
    "exaone4": (
        "EXAONE 4",
        "rotary, or none",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "exaone4:window": ("", "rotary in windows, or none", EVERY),
    "exaone_moe": (
        "EXAONE-MoE",
        "rotary in windows, or none",
        EVERY | EXPERTS | SHARED_EXPERT | {"head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "modernbert-decoder": (
        "ModernBERT decoder (Ettin)",
        f"{SOME_WINDOWS} with their own base",
        {"local_attention": 4, "layer_types": EVERY["layer_types"], "cls_token_id": 1, "sep_token_id": 2},
    ),
    "afmoe": ("AFMoE (Trinity)", "rotary in windows, or none", EVERY | EXPERTS | {"head_dim": 8}),
    "cwm": ("CWM", SOME_WINDOWS, EVERY | {"head_dim": 8}),
    "dots1": ("dots.llm1", SOME_WINDOWS, EVERY | ROUTED | {"head_dim": 8}),
    "mimo_v2_flash": (
        "MiMo-V2-Flash",
        f"{SOME_WINDOWS} with their own base, sink logits",
        EVERY | LOCAL | ROUTED | {"head_dim": 8, "v_head_dim": 6},
    ),
    "mellum": ("Mellum", f"{SOME_WINDOWS} with their own base", EVERY | LOCAL | EXPERTS | {"head_dim": 8}),
    "laguna": ("Laguna", f"{SOME_WINDOWS} with their own base", EVERY | LOCAL | EXPERTS | {"head_dim": 8}),
    "gptj": ("GPT-J", "interleaved rotary, a part of each head", GPT | NO_DROPOUT),
    "codegen": ("CodeGen", "interleaved rotary, a part of each head", GPT | NO_DROPOUT),
    "falcon": ("Falcon", "rotary", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon:rw": ("Falcon-RW", "ALiBi", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": ("MPT", "ALiBi", {"max_seq_len": 32}),
    "bloom": ("BLOOM", "ALiBi", {"n_layer": 2, "n_head": 4}),
}


def config(name: str) -> PreTrainedConfig:
    model_type = name.partition(":")[0]
    return AutoConfig.for_model(model_type, **SMALL | FAMILIES[name][2])


def table(differences: dict[str, float]) -> str:
    """Return the table of the docs, with the largest difference of each family."""
    rows = []
    for name, (family, positions, _) in FAMILIES.items():
        model_type = name.partition(":")[0]
        rows.append(f"| {family} | `{model_type}` | {positions} | {differences[name]:.0e} |\n")
    return HEADER + "".join(rows)


def main() -> None:
    torch.set_num_threads(1)
    differences = {name: check_family(random_model(config(name))) for name in FAMILIES}
    before, _, rest = PAGE.read_text().partition(HEADER)
    after = rest[rest.index("\n\n") + 1 :]
    PAGE.write_text(before + table(differences) + after)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}: {max(differences.values()):.0e}")


if __name__ == "__main__":
    main()
