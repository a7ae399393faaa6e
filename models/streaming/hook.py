"""The forward hooks by which a streaming cache steers its model, and nobody else's calls.

A cache alone cannot stream: a layer hands it keys that already carry a phase, the model chose that phase, and the
queries never pass by. So the cache hooks its model's decoder. When, and only when, a forward pass brings that cache,
the hook gives positions and routes the attention of this one pass to the cache; afterwards the model is as it was.
A pass longer than the cache's chunk is run in chunks.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ..sink_column import SinkColumn
from .adapters import Adapter, CacheRef, identity_mask

if TYPE_CHECKING:
    from .cache import StreamingCache

ATTENTION = "sinklm_streaming"


def streaming_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    streaming_cache: "StreamingCache",
    column: SinkColumn | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: the new tokens' states ``(B, H, T, D)`` in, ``(B, T, H, D)`` out."""
    out = streaming_cache.attend(module.layer_idx, query, key, value, scaling, column)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, streaming_attention)


class AttentionRoute:
    """Switches a decoder's attention to the cache and back."""

    def __init__(self, decoder: PreTrainedModel, adapter: Adapter | None, cache_ref: CacheRef):
        self.config, self.adapter = decoder.config, adapter
        self.users_choice: str | None = None
        self.is_held = False
        modules = adapter.modules(decoder) if adapter else []
        self.substitutes = [(module, partial(adapter.attend, cache_ref, module)) for module in modules if adapter]

    def enter(self) -> None:
        if self.is_held:
            return
        self.users_choice = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION  # also keeps the decoder from building masks
        for module, substitute in self.substitutes:
            module.forward = substitute

    def leave(self) -> None:
        if self.is_held or self.users_choice is None:
            return
        self.config._attn_implementation = self.users_choice
        self.users_choice = None
        for module, _ in self.substitutes:
            del module.forward

    @property
    def is_entered(self) -> bool:
        return self.users_choice is not None and not self.is_held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Enter now and leave at the end, and not within: for a pass whose code is traced."""
        self.enter()
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
            self.leave()


class StreamingHook:
    """A pair of forward hooks on the decoder of one cache's model."""

    cache: Callable[[], "StreamingCache | None"] = staticmethod(lambda: None)
    decoder: Callable[[], PreTrainedModel | None] = staticmethod(lambda: None)
    parameters: Sequence[str] = ()

    def __init__(self, cache: "StreamingCache", decoder: PreTrainedModel, adapter: Adapter | None):
        self.cache, self.decoder = weakref.ref(cache), weakref.ref(decoder)
        self.route = AttentionRoute(decoder, adapter, self.cache)  # type: ignore[arg-type]  # alive during its passes
        self.parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.earlier: list[list] = []  # outputs of the chunks already run, one list for each pass under way
        before = decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        after = decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        weakref.finalize(cache, _remove, self.route, before, after)

    def __getstate__(self) -> dict:
        """Nothing: a model may be copied or saved whole while it streams, and the copy's hook serves no cache."""
        return {}

    def cache_in(self, decoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple["StreamingCache | None", dict]:
        """This hook's cache if the call brings it, and all arguments by name."""
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = named.get("past_key_values")
        is_mine = cache is not None and cache is self.cache() and decoder is self.decoder()  # not a copy of the model
        return (cache if is_mine else None), named

    def before(self, decoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        own = self.cache()
        if own is not None and self.route.is_entered:  # Ctrl-C broke a pass off: torch tells hooks of errors only
            self.route.leave()
            self.earlier.clear()
            own.end_forward(succeeded=False)
        cache, named = self.cache_in(decoder, args, kwargs)
        if cache is None:
            return None
        self.earlier.append([])
        name = "inputs_embeds" if named.get("input_ids") is None else "input_ids"
        inputs, is_token = named[name], named.get("attention_mask")
        if len(self.earlier) == 1:
            is_token = cache.check_inputs(inputs, is_token)
            if named.get("use_cache") is False:  # then `generate` would feed the whole text again at each step
                raise ValueError("use_cache is False, yet a StreamingCache is given: pass use_cache=True")
        last = (inputs.shape[1] - 1) // cache.chunk_size * cache.chunk_size  # where the last chunk starts
        try:
            for start in range(0, last, cache.chunk_size):
                part = slice(start, start + cache.chunk_size)
                chunk = {name: inputs[:, part], "attention_mask": None if is_token is None else is_token[:, part]}
                self.earlier[-1].append(decoder(**{**named, **chunk}))
        except BaseException:
            cache.has_failed = True  # it has read a part of the prompt
            self.earlier.clear()
            raise
        inputs, is_token = inputs[:, last:], None if is_token is None else is_token[:, last:]
        position_ids = cache.begin_forward(inputs, is_token)
        self.route.enter()
        mask = identity_mask(self.route.adapter, inputs.shape[0], inputs.device)
        steered = {name: inputs, "attention_mask": mask, "position_ids": position_ids, "streaming_cache": cache}
        return (), {**named, **steered}

    def after(self, decoder: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> Any:
        cache, _ = self.cache_in(decoder, args, kwargs)
        if cache is None:
            return None
        self.route.leave()
        cache.end_forward(succeeded=output is not None)
        earlier = self.earlier.pop() if self.earlier else []
        return join_outputs([*earlier, output]) if earlier and output is not None else None


def _remove(route: AttentionRoute, *handles: Any) -> None:
    """Leave nothing of a cache that has gone, not even after a pass that Ctrl-C broke off."""
    route.leave()
    for handle in handles:
        handle.remove()


def join_outputs(outputs: list) -> Any:
    """One output for several chunks: what has a time axis is put end to end, the rest is the last chunk's."""
    if isinstance(outputs[-1], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:])
    joined = outputs[-1]
    joined.last_hidden_state = torch.cat([output.last_hidden_state for output in outputs], dim=1)
    if joined.hidden_states is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        joined.hidden_states = tuple(torch.cat(parts, dim=1) for parts in layers)
    return joined
