"""Start training from the weights of another model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, PreTrainedConfig
from transformers.utils import cached_file

from ..hub import UnreachableError
from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.arms import ARM_PARAMETERS
from ..models.config import describe_windows, sink_config, trained_windows
from ..text import one_line
from .checks import check_loaded, check_names, checked_config, read_tokenizer, weight_shapes
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
HEADS = r"^(embed_out|lm_head)\."  # the head in files, and in memory with newer versions of transformers


@dataclass(frozen=True)
class Source:
    """A model whose configuration and weights fit a run (`check_source`).

    Attributes:
        folder: its transformers folder, or its name on the Hub.
        config: its configuration.
        num_sinks: number of sink tokens that it was trained with.
    """

    folder: str
    config: PreTrainedConfig
    num_sinks: int

    def describe(self, config: SinkGPTNeoXConfig) -> str:
        """Return in words what a run of ``config`` takes from the model, and what it does not."""
        kind = config.sink_kind
        if kind == "token":
            rows = f", with {self.describe_rows(config)}"
        elif self.num_sinks:
            rows = f", without {_sinks(self.num_sinks, 'its')}"
        else:
            rows = ""
        has_new = kind not in ("none", "token", "zero") and sink_config(self.config).sink_kind != kind
        new = f"; the parameters of sink.kind {kind} are new" * has_new
        return f"all weights of {self.folder}{rows}{new}"

    def describe_rows(self, config: SinkGPTNeoXConfig) -> str:
        """Return in words where the rows of the sink tokens of ``config`` start."""
        num_known = min(self.num_sinks, config.num_sinks)
        num_new = config.num_sinks - num_known
        left_out = f" ({num_known} of {self.num_sinks})" * (self.num_sinks > num_known)
        known = f"the row{'s' * (num_known > 1)} of {_sinks(num_known, 'its')}{left_out}"
        if not num_new:
            return known
        others = ", the others at random" * (num_new > 1)
        new = f"{_sinks(num_new, 'a new' if num_new == 1 else f'{num_new} new')}"
        begin = f"{'the first' if others else 'which'} starts at the mean of the embedding{others}"
        return f"{known} and {new}, {begin}" if num_known else f"{new}, {begin}"


def _sinks(number: int, which: str) -> str:
    return f"{which} sink token{'s' * (number > 1)}"


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
        theirs = trained_windows(checked_config(_resolve(name_or_path)))
    ours = trained_windows(config)
    if theirs == ours:
        return None
    return (
        f"the attention changes: model.init_from was trained with {describe_windows(theirs)}, and this run trains with "
        f"{describe_windows(ours)}"
    )


def check_source(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> Source:
    """Check that the weights of a GPT-NeoX fit a run, without reading them.

    Their names and shapes are in the headers of the files. Those of a model that is on the Hub and
    not in a folder are not checked.

    Raises:
        ValueError: the other model is not GPT-NeoX, its architecture, arm or sink tokens differ, or
            its files are damaged or incomplete.
        FileNotFoundError: no model was found.
    """
    with _init_from(name_or_path):
        folder = _resolve(name_or_path)
        theirs = checked_config(folder)
    if theirs.model_type not in ("gpt_neox", "sink_gpt_neox"):
        raise ValueError(
            f"model.init_from={name_or_path} has model type {theirs.model_type}: use a GPT-NeoX model, such as Pythia"
        )
    _check_architecture(name_or_path, theirs, config)
    num_sinks = len(_trained_sinks(name_or_path, theirs, config))
    if Path(folder).is_dir():
        with _init_from(name_or_path):
            _check_shapes(folder, config)
    return Source(folder, theirs, num_sinks)


def load_weights(name_or_path: str | Path, config: SinkGPTNeoXConfig) -> SinkGPTNeoXForCausalLM:
    """Return a float32 model of ``config`` with the weights of a GPT-NeoX of the same sizes.

    Parameters that only the arm of ``config`` has are newly initialised. A sink token that the
    other model was not trained with starts at the mean of the embedding (`start_sink_rows`).

    Raises:
        ValueError: as `check_source`, or the weights differ from their checksums or are not finite.
        FileNotFoundError: no model was found.
    """
    source = check_source(name_or_path, config)
    with _init_from(name_or_path):
        verify_model_folder(source.folder)
        model = load_same_weights(source.folder, config, torch.float32)
    start_sink_rows(model, config.sink_token_ids[source.num_sinks :])
    return model


def count_tokens(name_or_path: str | Path, num_sinks: int) -> int | None:
    """Return the largest id of a model's tokenizer + 1, without sink tokens.

    Args:
        num_sinks: those for which a model without a tokenizer must have rows besides.

    Returns:
        The number, or None for a model that is not in a folder.

    Raises:
        ValueError: the configuration or the tokenizer is damaged.
        FileNotFoundError: no model was found.
    """
    with _init_from(name_or_path):
        folder = Path(_resolve(name_or_path))
        if not folder.is_dir():
            return None
        config = checked_config(str(folder))
        if sinks := sink_config(config).sink_token_ids:
            return sinks[0]
        if not (folder / "tokenizer.json").is_file():
            return config.vocab_size - num_sinks
        return max(read_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True).values()) + 1


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


def _check_architecture(name_or_path: str | Path, theirs: PreTrainedConfig, config: SinkGPTNeoXConfig) -> None:
    ours, wanted = architecture(config), architecture(theirs)
    if wrong := [key for key, value in wanted.items() if ours[key] != value]:
        found = ", ".join(f"model.{key} is {ours[key]}" for key in wrong)
        remedy = " ".join(f"model.{key}={wanted[key]}" for key in wrong)
        values = ", ".join(str(wanted[key]) for key in wrong)
        raise ValueError(f"{found}, but model.init_from={name_or_path} has {values}: set {remedy}")
    fixed = fixed_settings(config)
    for key, value in fixed_settings(theirs).items():
        if fixed[key] != value:
            raise ValueError(
                f"model.init_from={name_or_path} has {key} {value!r}, for which recipes have no key: use a model with "
                f"{fixed[key]!r}"
            )


def _check_shapes(folder: str, config: SinkGPTNeoXConfig) -> None:
    """Compare the names and shapes in the headers of the weights with those of the model."""
    with torch.device("meta"):
        parameters = SinkGPTNeoXForCausalLM(config).named_parameters()
    needed = {re.sub(HEADS, "embed_out.", name): tuple(parameter.shape) for name, parameter in parameters}
    found = {re.sub(HEADS, "embed_out.", name): shape for name, shape in weight_shapes(Path(folder)).items()}
    info = {
        "missing_keys": {key for key in needed.keys() - found.keys() if not re.search(ARM_PARAMETERS, key)},
        "mismatched_keys": [
            (key, found[key], needed[key]) for key in needed if found.get(key, needed[key]) != needed[key]
        ],
        "unexpected_keys": found.keys() - needed.keys(),
    }
    check_names(config, info, folder)


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


def _resolve(name_or_path: str | Path) -> str:
    """Like `resolve_model_folder`; its errors are complete, and `_init_from` only names the key."""
    try:
        return resolve_model_folder(name_or_path)
    except UnreachableError:
        raise
    except FileNotFoundError as error:
        raise _MissingError(str(error)) from error


class _MissingError(FileNotFoundError):
    """A model that was not found, with a remedy."""


@contextmanager
def _init_from(name_or_path: str | Path) -> Iterator[None]:
    """Name the key of the recipe in every error in reading the model."""
    key = f"model.init_from={name_or_path}"
    try:
        yield
    except (UnreachableError, _MissingError) as error:
        raise type(error)(f"{key}: {str(error).removeprefix(f'{name_or_path}: ')}") from error
    except OSError as error:
        raise FileNotFoundError(f"{key}: cannot read the model ({one_line(error)}); check its files") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
