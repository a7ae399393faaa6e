"""Find and load a model or tokenizer: from a training run, a checkpoint, any transformers folder, or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .folders import resolve_model_folder


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        name_or_path: a run folder (its newest complete checkpoint is taken), a checkpoint folder, a transformers
            folder, or a name on the Hub.
        dtype: data type of the weights; ``"auto"`` is that of the file. The default is that of the file too, but
            float32 on a CPU without instructions for it (`has_instructions_for`), where it would be slower.
        device: where to put the model; by default a GPU if there is one.

    Raises:
        FileNotFoundError: if the folder holds no complete checkpoint, or the name no model that can be reached.
        ValueError: if the weights are damaged, or not those of the model that its configuration names, or if that
            is no causal language model.
    """
    folder = resolve_model_folder(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with no_progress_bars() if Path(folder).is_dir() else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, output_loading_info=True
            )
    except OSError as error:
        raise FileNotFoundError(f"no model can be loaded from {str(name_or_path)!r}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({error}): copy them again, or take others") from error
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):  # then comes a list of all that there are
            raise
        raise ValueError(f"{name_or_path} is no causal language model: take one that predicts the next token") from None
    if info["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack {sorted(info['missing_keys'])[0]}: take others")
    if dtype is None and device.type == "cpu" and not has_instructions_for(model.dtype):
        model = model.float()
    return model.to(device).eval()


# Names of CPU instructions for 16-bit matrix products, on x86 and ARM, in `torch.cpu.get_capabilities`.
HALF_PRECISION_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Whether this CPU computes matrix products of a data type natively. 16-bit types are emulated on many."""
    names = HALF_PRECISION_INSTRUCTIONS.get(dtype)
    return names is None or any(map(torch.cpu.get_capabilities().get, names))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; see `load_model` for what ``name_or_path`` may be.

    Raises:
        FileNotFoundError: if there is none, or a damaged one; transformers would make up one without a vocabulary.
    """
    folder = resolve_model_folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer can be loaded from {str(name_or_path)!r}: {error}") from error
    if Path(folder).is_dir() and _is_made_up(tokenizer, Path(folder)):
        raise FileNotFoundError(f"{folder} has no tokenizer.json: copy there the one that the model was trained with")
    return tokenizer


def _is_made_up(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Where its files are missing transformers makes a tokenizer of special tokens alone."""
    files = set(tokenizer.vocab_files_names.values())  # empty where there is no vocabulary: one of bytes
    known = files | {"tokenizer.json", "tokenizer.model", "tekken.json"}
    return bool(files) and not any((folder / name).exists() for name in known)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Local files take no time worth a bar of transformers'."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
