"""Small models with sharp attention, and plain GPT-NeoX models with the same weights."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from sinklm.models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM

VOCABULARY = 320
FIRST_SINK = 300


def tiny_config(num_sinks: int = 1, **overrides) -> SinkGPTNeoXConfig:
    sink = {"kind": "token", "num_tokens": num_sinks, "first_token_id": FIRST_SINK} if num_sinks else {"kind": "none"}
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "sink": sink,
        **overrides,
    }
    return SinkGPTNeoXConfig(**settings)


def tiny_model(num_sinks: int = 1, dtype: torch.dtype = torch.float64, **overrides) -> SinkGPTNeoXForCausalLM:
    model = SinkGPTNeoXForCausalLM(tiny_config(num_sinks, **overrides)).to(dtype).eval()
    sharpen(model)
    return model


def sharpen(model: PreTrainedModel, factor: float = 3.0) -> None:
    """Scale the matrices: with sharp attention, a wrong position or mask changes the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(factor)


def tiny_arm(kind: str, dtype: torch.dtype = torch.float64, **overrides) -> SinkGPTNeoXForCausalLM:
    """A model with an arm; its sinks are as strong as trained ones, some stronger than any key."""
    model = tiny_model(0, dtype, sink={"kind": kind}, **overrides)
    draw_sinks(model)
    return model


def draw_sinks(model: PreTrainedModel) -> None:
    """Set an arm's sinks, which are initialised to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sink_logit"):
                parameter.copy_(torch.linspace(-2, 12, len(parameter)))
            elif "sink" in name:
                parameter.normal_(std=3)


def plain_twin(model: SinkGPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """transformers' own model with the same weights."""
    settings = model.config.to_dict()
    for key in ("sink", "model_type", "architectures"):
        settings.pop(key, None)
    config = GPTNeoXConfig(**settings, attn_implementation=model.config._attn_implementation)
    twin = GPTNeoXForCausalLM(config).to(model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def as_export(model: SinkGPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """The model as loaded from an export, whose tokenizer adds the sinks."""
    twin = plain_twin(model)
    twin.config.sink = model.config.sink
    return twin


def sinks(model: SinkGPTNeoXForCausalLM, batch_size: int) -> torch.Tensor:
    """``(B, n)`` sink ids, to be prepended to the input of the plain twin."""
    return torch.tensor(model.config.sink_token_ids, dtype=torch.long).expand(batch_size, -1)


def text(batch_size: int, num_tokens: int) -> torch.Tensor:
    """``(B, T)`` random ids without sinks and end-of-text tokens."""
    return torch.randint(1, FIRST_SINK, (batch_size, num_tokens))
