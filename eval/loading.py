"""Load a model to be evaluated: every measure here takes for granted that no token sees those after it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoints import load_model


def load_causal_model(name_or_path: str | Path) -> PreTrainedModel:
    """See `load_model`, which also loads models that attend both ways (BERT with a head of its own).

    Raises:
        ValueError: if the model is not causal.
    """
    model = load_model(name_or_path)
    if not is_causal(model):
        raise ValueError(f"{name_or_path} is not causal, its tokens see those after them: take a causal language model")
    return model


@torch.inference_mode()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether other tokens behind the first leave what is predicted after it as it is, but for rounding."""
    ids = torch.tensor([[0, 1, 1, 1], [0, 2, 3, 4]], device=model.device)
    one, other = model(ids, use_cache=False).logits[:, 0].float()  # (V,) each
    tolerance = max(1e-4, torch.finfo(model.dtype).eps)
    return not bool((one - other).abs().max() > tolerance * one.abs().max())  # what is not a number tells nothing
