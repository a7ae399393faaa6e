"""The mask of a text, from the masks that models of text and images compute themselves."""

from typing import Any

import torch
from torch import Tensor


def text_mask(mask: Any, num_inputs: int) -> Any:
    """Return the mask ``(B, tokens)`` of a text, None if all of its inputs are tokens.

    Args:
        mask: what a decoder gets: already such a mask, or None; or by type of layers, the mask of
            each query, ``(B, 1, T, keys)``, boolean or added to the scores.
        num_inputs: T.

    Raises:
        ValueError: a mask by type of layers is not that of a text with padding on the left.
    """
    if not isinstance(mask, dict):
        return mask
    full = mask.get("full_attention")
    if full is not None and full.ndim == 2:  # for FlashAttention
        return full
    sees = {name: seen_inputs(own, num_inputs) for name, own in mask.items() if own is not None}
    is_token = sees["full_attention"][:, -1] if full is not None else None  # the last token sees all tokens
    if not all(is_text(own, is_token, is_full=name == "full_attention") for name, own in sees.items()):
        raise ValueError(
            "attention_mask is not that of a text with padding on the left: a StreamingCache does not support images "
            "in models that let their tokens see each other"
        )
    return None if is_token is None else is_token.long()


def seen_inputs(mask: Tensor, num_inputs: int) -> Tensor:
    """Return which of the T inputs each query sees, ``(B, T, T)``."""
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, -num_inputs:]


def is_text(sees: Tensor, is_token: Tensor | None, *, is_full: bool) -> bool:
    """Whether each token sees itself and the tokens before it, or no later ones if not ``is_full``.

    Args:
        sees: ``(B, T, T)``.
        is_token: ``(B, T)``, None if all inputs are tokens.
    """
    allowed = torch.ones(sees.shape[1:], dtype=torch.bool, device=sees.device).tril()
    if is_token is not None:
        allowed = allowed & is_token[:, None] | ~is_token[:, :, None]
        sees = sees | ~is_token[:, :, None]
    return bool((sees == allowed).all() if is_full else (allowed | ~sees).all())
