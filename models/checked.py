"""Checks of what goes into a model and comes out of it, so that no result is silently wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NOT_FINITE = "the model's outputs are not finite: the checkpoint is damaged or its training diverged; use another"


def refuse_nonfinite_losses(losses: Tensor) -> Tensor:
    """Return losses unchanged, or raise a ValueError if one is NaN or infinite."""
    if not losses.isfinite().all():
        raise ValueError(NOT_FINITE)
    return losses


def refuse_nonfinite_logits(logits: Tensor) -> Tensor:
    """Return logits ``(…, V)`` unchanged.

    Raises:
        ValueError: a row has a NaN or +∞, or only -∞. Some entries may be -∞, which is how models
            exclude tokens.
    """
    if logits.numel() and not logits.amax(-1).isfinite().all():
        raise ValueError(NOT_FINITE)
    return logits


def check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Check the token ids of a text ``(…)`` before they are given to a model.

    Raises:
        ValueError: an id is outside of the vocabulary, for which torch raises an IndexError, or on
            a GPU ends the process; or an id is that of a sink, which the model adds itself.
    """
    if not ids.numel():
        return
    num_rows = model.get_input_embeddings().weight.shape[0]
    smallest, largest = map(int, torch.aminmax(ids))
    if smallest < 0 or largest >= num_rows:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"token id {wrong} is outside of the model's vocabulary of {num_rows}: use the tokenizer that the model "
            "was trained with"
        )
    sinks = getattr(model.config, "sink_token_ids", [])
    if sinks and ((ids >= sinks[0]) & (ids <= sinks[-1])).any():
        raise ValueError(
            f"the text contains the sink token with id {sinks[0]}, which the model puts in front of every text itself: "
            "remove it from the text, or use the tokenizer of the checkpoint instead of that of an export"
        )


@contextmanager
def checked_passes(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the ids and the logits of each forward pass of the model are checked."""

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            check_ids(ids, model)

    def after(_: Any, __: tuple, ___: dict, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None:
            refuse_nonfinite_logits(logits)

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
