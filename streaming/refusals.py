"""Model types that cannot stream, and why."""

from transformers import PreTrainedConfig

ABSOLUTE = "it adds absolute position embeddings before the first layer, so positions of cached keys cannot be moved"
RELATIVE = "its attention has relative positions of its own kind, neither rotary nor ALiBi"
LINEAR = "it has no keys to keep: linear attention and state-space layers store their past in a state of fixed size"
SCALED = "it multiplies the dimensions of its keys by weights after their rotation, so cached keys cannot be moved"
CHUNKED = "its layers see chunks of the text and no window, which was not tested with the streaming rule"
INDEXED = "its layers select the keys that a query sees, with an index of the whole text"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt", "openai-gpt", "ctrl"), ABSOLUTE),
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "electra", "bart", "mbart", "pegasus"), ABSOLUTE),
    **dict.fromkeys(("blenderbot", "marian", "whisper", "trocr", "git", "megatron-bert", "rembert", "xlm"), ABSOLUTE),
    **dict.fromkeys(("bert-generation", "big_bird", "data2vec-text", "ernie", "roberta-prelayernorm"), ABSOLUTE),
    **dict.fromkeys(("roc_bert", "xlm-roberta-xl", "xmod", "bigbird_pegasus", "blenderbot-small"), ABSOLUTE),
    **dict.fromkeys(("mvp", "plbart", "prophetnet"), ABSOLUTE),
    **dict.fromkeys(("xlnet", "cpmant", "reformer", "t5", "mt5", "umt5", "longt5"), RELATIVE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "qwen3_next", "xlstm"), LINEAR),
    **dict.fromkeys(("jamba", "bamba", "falcon_h1", "zamba", "zamba2", "minimax", "nemotron_h", "zaya"), LINEAR),
    **dict.fromkeys(("granitemoehybrid", "kimi_linear", "olmo_hybrid", "lfm2", "lfm2_moe"), LINEAR),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"), SCALED),
    **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), INDEXED),
}
KINDS_OF_LAYERS = {  # part of a name in `config.layer_types`
    "linear": LINEAR,
    "conv": LINEAR,
    "mamba": LINEAR,
    "hybrid": LINEAR,
    "recurrent": LINEAR,
    "indexed": INDEXED,
    "sparse": INDEXED,
    "compressed": INDEXED,
    "chunked": CHUNKED,
}


def refusal(model_type: str, config: PreTrainedConfig | None = None) -> str | None:
    """Return why a model type cannot stream, None if nothing is known against it.

    A type that is not listed may have layers of a listed kind.
    """
    if model_type in REFUSED:
        return REFUSED[model_type]
    kinds = " ".join(getattr(config, "layer_types", None) or ())
    return next((reason for name, reason in KINDS_OF_LAYERS.items() if name in kinds), None)
