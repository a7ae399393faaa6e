"""The mask of a text: taken from those that models of text and images compute, and checked."""

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


def which_are_tokens(mask: Tensor, batch_size: int, num_inputs: int) -> Tensor | None:
    """Return which of the last T inputs of a mask are tokens ``(B, T)``, None if all are.

    Raises:
        ValueError: the mask has the wrong shape, or other values than 0 and 1.
    """
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] < num_inputs:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: a StreamingCache requires a mask of shape "
            f"(batch, tokens) for at least the {num_inputs} new tokens of {batch_size} rows"
        )
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(
            "attention_mask has values other than 0 (padding) and 1 (token): pass the mask of the tokenizer, not "
            "one that is added to scores"
        )
    is_token = mask[:, -num_inputs:].bool()
    return None if is_token.all() else is_token


def check_padding(is_token: Tensor) -> None:
    """Raise a ValueError if a row ``(B, T)`` has a token, and padding on the right."""
    ends_in_padding = is_token.any(-1) & ~is_token[:, -1]  # a row may consist of padding only
    if ends_in_padding.any():
        raise ValueError(
            f"row {int(ends_in_padding.nonzero()[0])} of the batch has padding on the right: pad on the left "
            "(padding_side='left' in the tokenizer). The last generated token, which a used cache reads first, also "
            "comes after the padding"
        )
