"""Load models and tokenizers from training runs, checkpoints, transformers folders or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import models  # noqa: F401  (registers the type of our models with transformers)
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
        ValueError: a file differs from its checksum, the weights are damaged or do not match
            ``config.json``, or the model is not a causal language model.
    """
    folder = resolve_model_folder(name_or_path)
    verify_model_folder(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with no_progress_bars() if Path(folder).is_dir() else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, output_loading_info=True
            )
    except OSError as error:
        raise FileNotFoundError(f"cannot load a model from {str(name_or_path)!r}: {error}") from error
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {folder} are damaged ({error}): copy them again or use another checkpoint"
        ) from error
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):  # its message lists all classes
            raise
        raise ValueError(
            f"{name_or_path} is not a causal language model: use a model that predicts the next token"
        ) from None
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} lack {sorted(info['missing_keys'])[0]}, which its config.json requires: use the "
            "weights and the config.json of the same model"
        )
    if dtype is None and device.type == "cpu" and not has_instructions_for(model.dtype):
        model = model.float()
    return model.to(device).eval()


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
        ValueError: a file differs from its checksum.
    """
    folder = resolve_model_folder(name_or_path)
    verify_model_folder(folder, with_weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"cannot load a tokenizer from {str(name_or_path)!r}: {error}") from error
    if Path(folder).is_dir() and _is_made_up(tokenizer, Path(folder)):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json: copy the one that the model was trained with to this folder"
        )
    return tokenizer


def _is_made_up(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether transformers created a tokenizer of special tokens only because files are missing."""
    files = set(tokenizer.vocab_files_names.values())  # empty for tokenizers without a vocabulary, such as bytes
    known = files | {"tokenizer.json", "tokenizer.model", "tekken.json"}
    return bool(files) and not any((folder / name).exists() for name in known)


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
