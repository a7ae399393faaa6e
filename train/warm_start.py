"""Start from the weights of another model."""

from pathlib import Path

import torch
from transformers import AutoConfig

from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.loading import resolve_model_folder

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def load_weights(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> SinkGPTNeoXForCausalLM:
    """A model of ``config`` in float32 with the weights of any GPT-NeoX of the same sizes.

    Raises:
        ValueError: it is another kind of model, or a size differs (named).
        FileNotFoundError: there is no such model.
    """
    folder = resolve_model_folder(name_or_path)
    try:
        theirs = AutoConfig.from_pretrained(folder)
    except OSError as error:
        raise FileNotFoundError(f"model.init_from={name_or_path}: no model can be loaded ({error})") from error
    if theirs.model_type not in ("gpt_neox", "sink_gpt_neox"):
        raise ValueError(f"model.init_from={name_or_path} is a {theirs.model_type}, not a GPT-NeoX")
    for size in SIZES:
        if getattr(theirs, size) != getattr(config, size):
            raise ValueError(
                f"model.{size} is {getattr(config, size)}, but model.init_from={name_or_path} has "
                f"{getattr(theirs, size)}: set it to that"
            )
    return SinkGPTNeoXForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
