"""Start training from the weights of another model."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig
from transformers.utils import cached_file

from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.arms import ARM_PARAMETERS
from ..text import one_line
from .checks import check_loaded, checked_config, read_tokenizer
from .checksums import verify_model_folder
from .folders import resolve_model_folder
from .loading import from_pretrained

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def architecture(config: GPTNeoXConfig) -> dict[str, Any]:
    """Return the architecture that the weights require, by the recipe's keys.

    Rotary settings are included: weights load with other settings too, but the output is wrong.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    return {size: getattr(config, size) for size in SIZES} | {
        "parallel_residual": config.use_parallel_residual,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "rope_theta": float(rope.get("rope_theta", 10_000)),
    }


def check_tokenizer(name_or_path: str | Path, tokenizer_path: Path) -> None:
    """Compare a model's tokenizer, if it has one, with that of the data.

    Raises:
        ValueError: an id is a different token in the two tokenizers, or the model's is damaged.
    """
    try:
        found = cached_file(resolve_model_folder(name_or_path), "tokenizer.json")
    except OSError:
        return  # no tokenizer, or no model, for which `load_weights` raises an error
    verify_model_folder(str(Path(found).parent), with_weights=False)
    try:
        theirs = read_tokenizer(found)
    except ValueError as error:
        raise ValueError(f"model.init_from={name_or_path}: {error}") from error
    ours = read_tokenizer(tokenizer_path)
    for i in range(min(theirs.get_vocab_size(), ours.get_vocab_size())):
        if theirs.id_to_token(i) != ours.id_to_token(i):
            raise ValueError(
                f"model.init_from={name_or_path} was trained with another tokenizer: its token {i} is "
                f"{theirs.id_to_token(i)!r}, but {ours.id_to_token(i)!r} in {tokenizer_path}. Prepare the data with "
                f"the model's tokenizer: sinklm prepare … --tokenizer {found}"
            )


def load_weights(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> SinkGPTNeoXForCausalLM:
    """Return a float32 model of ``config`` with the weights of a GPT-NeoX of the same sizes.

    Parameters that only the arm of ``config`` has are newly initialised.

    Raises:
        ValueError: the other model is not GPT-NeoX, its architecture or arm differs, or its weights
            are damaged or incomplete.
        FileNotFoundError: no model was found.
    """
    folder = resolve_model_folder(name_or_path)
    try:
        theirs = checked_config(folder)
    except OSError as error:
        raise FileNotFoundError(
            f"model.init_from={name_or_path}: cannot load a model ({one_line(error)}); check the path"
        ) from error
    if theirs.model_type not in ("gpt_neox", "sink_gpt_neox"):
        raise ValueError(
            f"model.init_from={name_or_path} has model type {theirs.model_type}: use a GPT-NeoX model, such as Pythia"
        )
    ours, wanted = architecture(config), architecture(theirs)
    for key, value in wanted.items():
        if ours[key] != value:
            raise ValueError(
                f"model.{key} is {ours[key]}, but model.init_from={name_or_path} has {value}: set model.{key}={value}"
            )
    kind = getattr(theirs, "sink_kind", "none")
    if kind not in ("none", "token", config.sink_kind):
        raise ValueError(
            f"model.sink.kind is {config.sink_kind}, but model.init_from={name_or_path} was trained with {kind}: set "
            f"model.sink.kind={kind}, or start from a model whose sink.kind is none or token"
        )
    verify_model_folder(folder)
    try:
        model, info = from_pretrained(SinkGPTNeoXForCausalLM, folder, config=config, dtype=torch.float32)
        info["missing_keys"] = {key for key in info["missing_keys"] if not re.search(ARM_PARAMETERS, key)}
        check_loaded(model, info, folder)
    except OSError as error:
        raise FileNotFoundError(f"model.init_from={name_or_path}: {one_line(error)}; copy the folder again") from error
    except ValueError as error:
        raise ValueError(f"model.init_from={name_or_path}: {error}") from error
    return model
