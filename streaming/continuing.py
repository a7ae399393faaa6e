"""Checks the text that transformers' `generate` continues with a cache that has read some already.

`generate` takes the whole text, of which it skips as many tokens as the cache has seen, whatever
they are. Only the text's length tells it from a new turn. While a model has streaming caches, two
methods of `generate` are therefore replaced, in which the whole text passes by once per call.
"""

import copy
import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..models.cache_argument import NAMES
from .wrappers import decoder_of

if TYPE_CHECKING:
    from .cache import StreamingCache

FULL = "pass `generate` the full sequence, that is the tokens that are already in the cache followed by the new ones"


class CheckedMethod:
    """Replaces a method of a model for the lifetime of its streaming caches.

    A deep copy and a pickle of the model get the original method.
    """

    name: str

    def __init__(self, model: GenerationMixin):
        self.model = weakref.ref(model)
        self.replaced = vars(model).get(self.name)
        self.num_caches = 0
        self.__signature__ = inspect.signature(self.original)  # `generate` looks up names of arguments

    @property
    def original(self) -> Any:
        return self.replaced or getattr(type(self.model()), self.name).__get__(self.model())

    @classmethod
    def install(cls, cache: "StreamingCache", model: Any) -> None:
        method = vars(model).get(cls.name)
        if not isinstance(method, cls) or method.model() is not model:
            method = cls(model)
            setattr(model, cls.name, method)
        method.num_caches += 1
        weakref.finalize(cache, method.release)

    def release(self) -> None:
        self.num_caches -= 1
        model = self.model()
        if self.num_caches or model is None or vars(model).get(self.name) is not self:
            return
        delattr(model, self.name)
        if self.replaced is not None:
            setattr(model, self.name, self.replaced)

    def __deepcopy__(self, memo: dict) -> Any:
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        model = memo[id(self.model())]
        return getattr(type(model), self.name).__get__(model)

    def __reduce__(self) -> Any:
        return getattr, (self.model(), self.name)


class CheckedPrefill(CheckedMethod):
    """`GenerationMixin._prefill`: the first pass of all kinds of generation but assisted."""

    name = "_prefill"
    is_running = False

    def __call__(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        cache = used_cache(model_kwargs)
        if cache is not None:
            is_first = args[0] if args else kwargs.get("is_first_iteration", True)
            mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
            mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[-1]
            if embeds is not None and is_first:
                check_length(cache, embeds.shape[1])
            elif mask_length == input_ids.shape[1]:
                check_text(cache, input_ids, mask)
            elif mask_length != -1:
                check_new_length(cache, input_ids.shape[1], mask_length)
        if any(is_streaming(model_kwargs.get(name)) for name in NAMES) and generation_config.prefill_chunk_size:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None  # the cache has its own chunks
        self.is_running = True
        try:
            return self.original(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            self.is_running = False


class PreparedInputs(CheckedMethod):
    """`prepare_inputs_for_generation`: assisted generation would read the whole text again."""

    name = "prepare_inputs_for_generation"

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = used_cache(kwargs)
        is_checked = getattr(vars(self.model())["_prefill"], "is_running", False)
        if cache is not None and not is_checked and kwargs.get("is_first_iteration"):
            is_assisted = "next_sequence_length" in kwargs and kwargs["next_sequence_length"] is None
            if is_assisted and kwargs.get("inputs_embeds") is None:
                check_text(cache, input_ids, kwargs.get("attention_mask"))
                kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        return self.original(input_ids, *args, **kwargs)


def check_generation(cache: "StreamingCache", model: nn.Module) -> None:
    """Check all texts that a model, or one inside its wrappers, continues with this cache."""
    for module in model.modules():
        if isinstance(module, GenerationMixin) and decoder_of(module) is cache.decoder:
            CheckedPrefill.install(cache, module)
            PreparedInputs.install(cache, module)


def is_streaming(cache: Any) -> bool:
    return hasattr(cache, "record") and hasattr(cache, "steering")


def used_cache(named: dict) -> "StreamingCache | None":
    """Return the streaming cache among these arguments if it has read a text."""
    for name in NAMES:
        cache: Any = named.get(name)
        if is_streaming(cache) and cache.is_initialized:
            return cache
    return None


def num_text_columns(cache: "StreamingCache") -> int:
    return cache.get_seq_length() - getattr(cache.decoder.config, "num_sinks", 0)


def check_length(cache: "StreamingCache", num_given: int) -> None:
    """Raise a ValueError if a text has no tokens after those that were read."""
    num_seen = num_text_columns(cache)
    if num_given <= num_seen:
        raise ValueError(
            f"no new tokens for this StreamingCache: the text has {num_given} tokens, and the cache has read "
            f"{num_seen}. To continue, {FULL}; to begin another text, call reset()"
        )


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
    record, num_seen = cache.record, num_text_columns(cache)
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
        f"continue, {FULL}; to begin another text, call reset()"
    )
