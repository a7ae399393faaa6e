"""Loads models for evaluation, which requires causal models."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints import load_model
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
