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
    if full is None or full.ndim == 2:  # without padding, or for FlashAttention
        return full
    sees = (full if full.dtype == torch.bool else full == 0)[:, 0, :, -num_inputs:]  # (B, T, T)
    is_token = sees[:, -1]  # the last token sees all tokens
    if not is_text(sees, is_token):
        raise ValueError(
            "attention_mask is not that of a text with padding on the left: a StreamingCache does not support images "
            "in models that let their tokens see each other"
        )
    return is_token.long()


def is_text(sees: Tensor, is_token: Tensor) -> bool:
    """Whether each token sees itself and the tokens before it, in ``sees`` ``(B, T, T)``."""
    causal = torch.ones(sees.shape[1:], dtype=torch.bool, device=sees.device).tril()
    return bool(((sees == (causal & is_token[:, None])) | ~is_token[:, :, None]).all())
