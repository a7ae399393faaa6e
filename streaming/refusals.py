"""Model types that cannot stream, and why."""

from transformers import PreTrainedConfig

ABSOLUTE = "it adds absolute position embeddings before the first layer, so positions of cached keys cannot be moved"
LINEAR = "it has no keys to keep: linear attention and state-space layers store their past in a state of fixed size"
LAYERED = "some of its layers have their own sliding window, with rules that differ between layers"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt", "openai-gpt", "ctrl"), ABSOLUTE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "qwen3_next"), LINEAR),
    **dict.fromkeys(("jamba", "bamba", "falcon_h1", "zamba", "zamba2", "minimax"), LINEAR),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "cohere2", "olmo3", "gpt_oss"), LAYERED),
}


def refusal(model_type: str, config: PreTrainedConfig | None = None) -> str | None:
    """Return why a model type cannot stream, None if nothing is known against it."""
    return REFUSED.get(model_type)


def num_embedded_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model with absolute position embeddings, else None."""
    is_absolute = REFUSED.get(config.model_type) == ABSOLUTE
    return getattr(config, "max_position_embeddings", None) if is_absolute else None
