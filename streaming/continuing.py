"""Checks the text that transformers' `generate` continues with a cache that has read some already.

`generate` takes the whole text, of which it skips as many tokens as the cache has seen, whatever
they are. Only the text's length tells it from a new turn. With the first streaming cache, three
methods of `GenerationMixin`, and of classes that override them, are therefore wrapped. The whole
text passes by them once per call. Calls without a streaming cache are not changed.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..models.cache_argument import NAMES
from ..models.config import num_prepended_sinks
from .wrappers import refuse_prompts_of_owner

if TYPE_CHECKING:
    from .cache import StreamingCache

FULL = "pass `generate` the full sequence, that is the tokens that are already in the cache followed by the new ones"
is_checked: ContextVar[bool] = ContextVar("is_checked", default=False)  # within a wrapped method


def checked_prefill(original: Callable) -> Callable:
    """Wrap `GenerationMixin._prefill`: the first pass of all kinds of generation but assisted."""

    @functools.wraps(original)
    def prefill(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        cache = streaming_cache(model_kwargs)
        if cache is None:
            return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
        wrap_methods(type(model))
        if cache.is_initialized:
            is_first = args[0] if args else kwargs.get("is_first_iteration", True)
            mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
            mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[-1]
            if embeds is not None and is_first:
                check_length(cache, embeds.shape[1])
            elif mask_length == input_ids.shape[1]:
                check_text(cache, input_ids, mask)
            elif mask_length != -1:
                check_new_length(cache, input_ids.shape[1], mask_length)
        if generation_config.prefill_chunk_size:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None  # the cache has its own chunks
        token = is_checked.set(True)
        try:
            return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            is_checked.reset(token)
            cache.next_ids = None  # of a pass that failed before it reached the decoder

    return prefill


def checked_inputs(original: Callable) -> Callable:
    """Wrap `prepare_inputs_for_generation`.

    Assisted generation would read the whole text again. Some models (Phi-3) drop the cache once the
    text is longer than their original context, since their keys change there; those of a streaming
    cache do not, so they get the inputs of `GenerationMixin`.
    """

    @functools.wraps(original)
    def prepare(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = streaming_cache(kwargs)
        is_first = not is_checked.get() and kwargs.get("is_first_iteration")
        if cache is not None and cache.is_initialized and is_first:
            is_assisted = "next_sequence_length" in kwargs and kwargs["next_sequence_length"] is None
            if is_assisted and kwargs.get("inputs_embeds") is None:
                check_assisted(cache, input_ids, kwargs.get("attention_mask"))
                kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        token = is_checked.set(True)
        try:
            inputs = original(model, input_ids, *args, **kwargs)
            if cache is not None:
                if streaming_cache(inputs) is None:
                    inputs = GenerationMixin.prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
                cache.next_ids = inputs.get("input_ids")
            return inputs
        finally:
            is_checked.reset(token)

    return prepare


def checked_caller(original: Callable) -> Callable:
    """Wrap `_prepare_cache_for_generation`, which each kind of generation calls once."""

    @functools.wraps(original)
    def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        if streaming_cache(model_kwargs) is not None:
            refuse_prompts_of_owner(model)
        return original(model, generation_config, model_kwargs, *args, **kwargs)

    return prepare_cache


WRAPPERS = {
    "_prefill": checked_prefill,
    "_prepare_cache_for_generation": checked_caller,
    "prepare_inputs_for_generation": checked_inputs,
}


def check_generation(model: nn.Module) -> None:
    """Check all texts that are continued with a streaming cache, by this model or one inside it."""
    for module in model.modules():
        if isinstance(module, GenerationMixin):
            wrap_methods(type(module))


def wrap_methods(model_class: type) -> None:
    """Wrap the methods of a model's class, and those of `GenerationMixin`, if they are not yet."""
    for name, wrapper in WRAPPERS.items():
        for owner in (GenerationMixin, *model_class.__mro__):
            method = vars(owner).get(name)
            if method is not None and not hasattr(method, "checks_streaming"):
                wrapped: Any = wrapper(method)
                wrapped.checks_streaming = True
                setattr(owner, name, wrapped)


def streaming_cache(named: Mapping[str, Any]) -> "StreamingCache | None":
    """Return the streaming cache among these arguments."""
    caches = (named.get(name) for name in NAMES)
    return next((cache for cache in caches if hasattr(cache, "streams") and hasattr(cache, "steering")), None)


def num_text_columns(cache: "StreamingCache") -> int:
    return cache.get_seq_length() - num_prepended_sinks(cache.decoder.config)


def check_length(cache: "StreamingCache", num_given: int) -> None:
    """Raise a ValueError if a text has no tokens after those that were read."""
    num_seen = num_text_columns(cache)
    if num_given <= num_seen:
        raise ValueError(
            f"no new tokens for this StreamingCache: the text has {num_given} tokens, and the cache has read "
            f"{num_seen}. To continue, {FULL}; to begin another text, call reset()"
        )


def check_assisted(cache: "StreamingCache", ids: Tensor, mask: Tensor | None) -> None:
    """As `check_text`, for assisted generation, whose mask has been cut to the text."""
    try:
        check_text(cache, ids, mask)
    except ValueError as error:
        raise ValueError(f"{error}. Prompt lookup and assistants cannot continue with new tokens alone") from None


def check_new_length(cache: "StreamingCache", num_new: int, mask_length: int) -> None:
    """Raise a ValueError if a mask does not cover the tokens that were read and the new ones."""
    num_seen = num_text_columns(cache)
    if mask_length != num_seen + num_new:
        raise ValueError(
            f"attention_mask covers {mask_length} tokens, but this StreamingCache has read {num_seen} and gets "
            f"{num_new} new ones. The last token that `generate` returned is not in the cache yet: {FULL}"
        )


def check_text(cache: "StreamingCache", ids: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if a text ``(B, T)`` does not begin with what the cache has read."""
    check_length(cache, ids.shape[1])
    record, num_seen = cache.streams.record, num_text_columns(cache)
    if record is None or not record.is_known or len(ids) != cache.batch_size:
        return  # another batch size is an error of the cache
    sinks = torch.tensor(getattr(cache.decoder.config, "sink_token_ids", []), dtype=torch.long, device=ids.device)
    read = torch.cat((sinks.expand(len(ids), -1), ids[:, :num_seen]), dim=1)
    is_token = None
    if mask is not None and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
        text = mask[:, mask.shape[1] - ids.shape[1] :][:, :num_seen].bool()
        is_token = torch.cat((torch.ones_like(read[:, : len(sinks)], dtype=torch.bool), text), dim=1)
    is_same = record.has_read(read, is_token)
    if is_same.all():
        return
    rows = (~is_same).nonzero().flatten().tolist()
    if is_token is not None and record.has_read(read, None)[rows].all():
        raise ValueError(
            f"attention_mask marks tokens as padding that this StreamingCache has read as text (rows {rows}): "
            "`generate` pads rows that end early, and reads the padding. Pass a mask with 1 for these tokens"
        )
    raise ValueError(
        f"the text does not begin with the {num_seen} tokens that this StreamingCache has read (rows {rows}). To "
        f"continue, {FULL}; to begin another text, or after beam search, call reset()"
    )
