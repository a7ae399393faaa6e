"""Loads causal models for evaluation, and token stores that fit them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import load_model
from ..data import open_store
from ..data.store import TokenSource
from ..models.checked import refuse_nonfinite_logits


def load_causal_model(name_or_path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model with `load_model` and check that it is causal (unlike, for example, BERT).

    Args:
        options: as in `load_model`.

    Raises:
        ValueError: the model is not causal, or its outputs are not finite.
    """
    model = load_model(name_or_path, **options)
    if not is_causal(model):
        raise ValueError(f"{name_or_path} is not causal, its tokens attend to later ones: use a causal language model")
    return model


@torch.inference_mode()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the logits of the first token are independent of later tokens, to rounding.

    Raises:
        ValueError: the logits are not finite.
    """
    ids = torch.tensor([[0, 1, 1, 1], [0, 2, 3, 4]], device=model.device)
    one, other = refuse_nonfinite_logits(model(ids, use_cache=False).logits)[:, 0].float()  # (V,) each
    tolerance = max(1e-4, torch.finfo(model.dtype).eps)
    both = one.isfinite() & other.isfinite()  # a model may exclude tokens by -∞
    return not bool((one - other)[both].abs().max() > tolerance * one[both].abs().max())


def open_store_of(path: Path, tokenizer: PreTrainedTokenizerBase) -> TokenSource:
    """Open a token store, or pre-shuffled rows, that was made with a model's tokenizer.

    Files that are new, or have changed since the last check, are compared with their checksums.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the store was made with another tokenizer, or is damaged.
    """
    store = open_store(path)
    ids = Tokenizer.from_file(str(store.tokenizer_path)).get_vocab()
    known = tokenizer.get_vocab()
    if any(known.get(token) != i for token, i in ids.items()):
        raise ValueError(
            f"{path} was made with a different tokenizer than the model's: prepare the text again with the model's, "
            "`sinklm prepare … --tokenizer TOKENIZER`"
        )
    return store
