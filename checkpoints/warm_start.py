"""Start training from the weights of another model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, PreTrainedConfig
from transformers.utils import cached_file

from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.arms import ARM_PARAMETERS
from ..models.config import describe_windows, sink_config, trained_windows
from ..text import one_line
from .checks import check_loaded, checked_config, read_tokenizer
from .checksums import verify_model_folder
from .folders import resolve_model_folder
from .loading import from_pretrained
from .sink_rows import start_sink_rows

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
WITHOUT_KEY = ("hidden_act", "layer_norm_eps", "attention_bias", "tie_word_embeddings")


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


def fixed_settings(config: GPTNeoXConfig) -> dict[str, Any]:
    """Return the settings that change the output and that recipes have no key for."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    return {key: getattr(config, key) for key in WITHOUT_KEY} | {"rope_type": rope.get("rope_type", "default")}


def check_tokenizer(name_or_path: str | Path, tokenizer_path: Path) -> None:
    """Compare a model's tokenizer, if it has one, with that of the data.

    Raises:
        ValueError: an id is a different token in the two tokenizers, or the model's is damaged.
    """
    try:
        found = cached_file(resolve_model_folder(name_or_path), "tokenizer.json")
    except OSError:
        return  # no tokenizer, or no model, for which `load_weights` raises an error
    with _init_from(name_or_path):
        verify_model_folder(str(Path(found).parent), with_weights=False)
        theirs = read_tokenizer(found)
    ours = read_tokenizer(tokenizer_path)
    for i in range(min(theirs.get_vocab_size(), ours.get_vocab_size())):
        if theirs.id_to_token(i) != ours.id_to_token(i):
            raise ValueError(
                f"model.init_from={name_or_path} was trained with another tokenizer: its token {i} is "
                f"{theirs.id_to_token(i)!r}, but {ours.id_to_token(i)!r} in {tokenizer_path}. Prepare the data with "
                f"the model's tokenizer: sinklm prepare … --tokenizer {found}"
            )


def describe_change(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> str | None:
    """Return a line about the windows if they differ from those of the other model's training.

    Raises:
        ValueError: its configuration is damaged.
        FileNotFoundError: no model was found.
    """
    with _init_from(name_or_path):
        theirs = trained_windows(checked_config(resolve_model_folder(name_or_path)))
    ours = trained_windows(config)
    if theirs == ours:
        return None
    return (
        f"the attention changes: model.init_from was trained with {describe_windows(theirs)}, and this run trains with "
        f"{describe_windows(ours)}"
    )


def load_weights(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> SinkGPTNeoXForCausalLM:
    """Return a float32 model of ``config`` with the weights of a GPT-NeoX of the same sizes.

    Parameters that only the arm of ``config`` has are newly initialised. A sink token that the
    other model was not trained with starts at the mean of the embedding (`start_sink_rows`).

    Raises:
        ValueError: the other model is not GPT-NeoX, its architecture, arm or sink tokens differ, or
            its weights are damaged or incomplete.
        FileNotFoundError: no model was found.
    """
    folder = resolve_model_folder(name_or_path)
    with _init_from(name_or_path):
        theirs = checked_config(folder)
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
    fixed = fixed_settings(config)
    for key, value in fixed_settings(theirs).items():
        if fixed[key] != value:
            raise ValueError(
                f"model.init_from={name_or_path} has {key} {value!r}, for which recipes have no key: use a model with "
                f"{fixed[key]!r}"
            )
    known = _trained_sinks(name_or_path, theirs, config)
    with _init_from(name_or_path):
        verify_model_folder(folder)
        model = load_same_weights(folder, config, torch.float32)
    start_sink_rows(model, [token_id for token_id in config.sink_token_ids if token_id not in known])
    return model


def load_same_weights(folder: str, config: SinkGPTNeoXConfig, dtype: torch.dtype | str) -> SinkGPTNeoXForCausalLM:
    """Load weights of the same shapes into a model; those of its arm may be missing.

    Raises:
        ValueError: a weight is damaged, missing or of another shape.
        OSError: a file cannot be read.
    """
    model, info = from_pretrained(SinkGPTNeoXForCausalLM, folder, config=config, dtype=dtype)
    info["missing_keys"] = {key for key in info["missing_keys"] if not re.search(ARM_PARAMETERS, key)}
    check_loaded(model, info, folder)
    return model


def _trained_sinks(name_or_path: str | Path, theirs: PreTrainedConfig, config: SinkGPTNeoXConfig) -> list[int]:
    """Return the ids of the sink tokens that the other model was trained with.

    Raises:
        ValueError: it was trained with another arm, or its sink tokens have other ids.
    """
    with _init_from(name_or_path):
        sink = sink_config(theirs)
    kind = sink.sink_kind
    if kind not in ("none", "token", config.sink_kind):
        raise ValueError(
            f"model.sink.kind is {config.sink_kind}, but model.init_from={name_or_path} was trained with {kind}: set "
            f"model.sink.kind={kind}, or start from a model whose sink.kind is none or token"
        )
    if kind != "token":
        return []
    first = sink.sink_token_ids[0]
    if config.num_sinks and first != config.sink_token_ids[0]:
        raise ValueError(
            f"model.init_from={name_or_path} has its first sink token at id {first}, but the first id that the data's "
            f"tokenizer does not use is {config.sink_token_ids[0]}: prepare the data with the tokenizer of the model"
        )
    return sink.sink_token_ids


@contextmanager
def _init_from(name_or_path: str | Path) -> Iterator[None]:
    """Name the key of the recipe in every error in reading the model."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"model.init_from={name_or_path}: cannot read the model ({one_line(error)}); check the path and the files"
        ) from error
    except ValueError as error:
        raise ValueError(f"model.init_from={name_or_path}: {error}") from error
