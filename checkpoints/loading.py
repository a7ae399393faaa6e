"""Load models and tokenizers from training runs, checkpoints, transformers folders or the Hub."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .. import models  # noqa: F401  (registers the type of our models with transformers)
from ..chat_templates import begins_with_sinks
from ..rust import is_panic
from ..text import one_line
from .checks import check_loaded, check_tokenizer, checked_config, damaged_weights, foreign_code
from .checksums import verify_model_folder
from .folders import resolve_model_folder


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        name_or_path: a run folder (its newest complete checkpoint is loaded), a checkpoint folder,
            a transformers folder, or a name on the Hub.
        dtype: dtype of the weights; ``"auto"`` uses that of the file. The default does too, except
            on a CPU without instructions for it (`has_instructions_for`), where float32 is faster.
        device: device of the model; default: a GPU if there is one.

    Raises:
        FileNotFoundError: the folder has no complete checkpoint, or no model can be found.
        ValueError: a file differs from its checksum, ``config.json`` is wrong, the weights are
            damaged, not finite or do not match it, or the model is not a causal language model.
    """
    folder = resolve_model_folder(name_or_path)
    verify_model_folder(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        config = checked_config(folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{name_or_path} is not a causal language model: use a model that predicts the next token")
        model, info = from_pretrained(AutoModelForCausalLM, folder, dtype="auto" if dtype is None else dtype)
    except OSError as error:
        raise FileNotFoundError(f"cannot load a model from {str(name_or_path)!r}: {one_line(error)}") from error
    model = model.to(device).eval()
    check_loaded(model, info, folder)
    if dtype is None and device.type == "cpu" and not has_instructions_for(model.dtype):
        model = model.float()
    return model


def from_pretrained(loader: Any, folder: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Call ``loader.from_pretrained``, which reads only safetensors and runs no code of the model.

    Returns:
        The model and its loading info, which `check_loaded` checks.

    Raises:
        ValueError: the files are damaged or do not fit together.
        OSError: the files cannot be found or read.
    """
    try:
        with quiet_loading(is_local=Path(folder).is_dir()):
            return loader.from_pretrained(
                folder,
                **options,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
                trust_remote_code=False,
                use_safetensors=True,
            )
    except SafetensorError as error:
        raise damaged_weights(folder, error) from error
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises anything for files that do not fit together
        if "can't allocate memory" in str(error):
            raise
        raise ValueError(
            f"cannot load a model from {folder}: {one_line(error)}; use the config.json and the weights of the same "
            "model"
        ) from error


@contextmanager
def only_errors() -> Iterator[None]:
    """Hide warnings that transformers logs."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet_loading(*, is_local: bool) -> Iterator[None]:
    """Hide transformers' report on the loaded keys, and its progress bars for local files."""
    with only_errors(), no_progress_bars() if is_local else nullcontext():
        yield


# CPU instructions for 16-bit matrix products on x86 and ARM, as in `torch.cpu.get_capabilities`.
HALF_PRECISION_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products of a dtype; many lack 16-bit types."""
    names = HALF_PRECISION_INSTRUCTIONS.get(dtype)
    return names is None or any(map(torch.cpu.get_capabilities().get, names))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; ``name_or_path`` is as in `load_model`.

    Raises:
        FileNotFoundError: there is no tokenizer or it is damaged. transformers would create one
            without a vocabulary.
        ValueError: a file differs from its checksum, or the tokenizer fails on simple texts or
            needs seconds for each.

    Warns:
        UserWarning: the tokenizer is of an export, and its chat template leaves out the sink.
    """
    folder = resolve_model_folder(name_or_path)
    verify_model_folder(folder, with_weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises bare exceptions, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if "trust_remote_code" in str(error):
            raise foreign_code(folder) from None
        raise FileNotFoundError(
            f"cannot load a tokenizer from {str(name_or_path)!r}: {one_line(error)}; copy the tokenizer files of the "
            "model to this folder"
        ) from error
    if Path(folder).is_dir() and _is_made_up(tokenizer, Path(folder)):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json: copy the one that the model was trained with to this folder"
        )
    check_tokenizer(tokenizer, folder)
    _check_template(tokenizer, folder)
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Warn if a chat template leaves out the sinks, which the tokenizer of an export puts first."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not str(tokenizer.bos_token).startswith("<|sink"):
        return
    added = (token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()))
    names = [name for name in added if re.fullmatch(r"<\|sink\d*\|>", name)]
    if not begins_with_sinks(tokenizer, template, names):
        warnings.warn(
            f"the chat template of {folder} does not begin with the sink, with which the model was trained: put "
            f"{'{{ bos_token }}' if len(names) == 1 else ''.join(names)} at its beginning",
            stacklevel=3,
        )


def _is_made_up(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether transformers created a tokenizer of special tokens only because files are missing."""
    files = set(tokenizer.vocab_files_names.values())  # empty for tokenizers without a vocabulary, such as bytes
    known = files | {"tokenizer.json", "tokenizer.model", "tekken.json"}
    return bool(files) and not any((folder / name).exists() for name in known)


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Call ``save_pretrained`` without progress bars, and let everyone read the weights."""
    if not torch.cuda.is_available():  # transformers imports DeepSpeed, which would warn that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with no_progress_bars():
        model.save_pretrained(folder, **options)
    let_everyone_read(folder)


def let_everyone_read(folder: Path) -> None:
    """Give the weights the mode of ``config.json``; safetensors lets only the owner read them."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars, which local files do not need."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
