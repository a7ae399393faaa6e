"""The forward hooks by which a streaming cache steers its model, and nobody else's calls.

A cache alone cannot stream: a layer hands it keys that already carry a phase, the model chose that phase, and the
queries never pass by. So the cache hooks its model's decoder. When, and only when, a forward pass brings that cache,
the hook gives positions and routes the attention of this one pass to the cache; afterwards the model is as it was.
A pass longer than the cache's chunk is run in chunks.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from ..models.attention import register_column_attention
from ..models.sink_column import SinkColumn
from .adapters import Adapter, identity_mask

if TYPE_CHECKING:
    from .cache import StreamingCache

ATTENTION = "sinklm_streaming"
STEERED = "streaming_cache"  # the argument by which a steered pass tells its layers of the cache


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
register_column_attention(ATTENTION, streaming_attention)


class AttentionRoute:
    """Switches a decoder's attention to a cache and back. All caches of a decoder share one."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.users_choice: str | None = None
        self.hook: StreamingHook | None = None  # whose pass is under way
        self.is_held = False

    def enter(self, hook: "StreamingHook") -> None:
        if self.is_held:
            return
        self.hook, self.users_choice = hook, self.config._attn_implementation
        self.config._attn_implementation = ATTENTION  # also keeps the decoder from building masks
        for module, substitute in hook.substitutes:
            module.forward = substitute

    def leave(self) -> None:
        if self.is_held or self.hook is None:
            return
        self.config._attn_implementation = self.users_choice
        for module, _ in self.hook.substitutes:
            del module.forward
        self.hook = self.users_choice = None

    def clean_up(self) -> None:
        """Leave a pass that Ctrl-C broke off, whichever cache it had: torch tells hooks of errors only."""
        hook = self.hook
        if hook is None or self.is_held:
            return
        self.leave()
        hook.earlier.clear()
        if (cache := hook.cache()) is not None:
            cache.end_forward(succeeded=False)

    @contextmanager
    def held(self, hook: "StreamingHook") -> Iterator[None]:
        """Enter now and leave at the end, and not within: for a pass whose code is traced."""
        self.clean_up()
        self.enter(hook)
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
            self.leave()


ROUTES: weakref.WeakKeyDictionary[PreTrainedModel, AttentionRoute] = weakref.WeakKeyDictionary()


class StreamingHook:
    """A pair of forward hooks on the decoder of one cache's model."""

    cache: Callable[[], "StreamingCache | None"] = staticmethod(lambda: None)
    decoder: Callable[[], PreTrainedModel | None] = staticmethod(lambda: None)

    def __init__(self, cache: "StreamingCache", decoder: PreTrainedModel, adapter: Adapter | None):
        self.cache, self.decoder, self.adapter = weakref.ref(cache), weakref.ref(decoder), adapter
        self.route = ROUTES.setdefault(decoder, AttentionRoute(decoder.config))
        modules = adapter.modules(decoder) if adapter else []
        self.substitutes = [(module, partial(adapter.attend, self.cache, module)) for module in modules if adapter]
        self.parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.earlier: list[list] = []  # outputs of the chunks already run, one list for each pass under way
        before = decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        after = decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        weakref.finalize(cache, self.remove, before, after)

    def remove(self, *handles: Any) -> None:
        """Leave nothing of a cache that has gone, not even after a pass that Ctrl-C broke off."""
        if self.route.hook is self:
            self.route.leave()
        for handle in handles:
            handle.remove()

    def held(self) -> AbstractContextManager[None]:
        """See `AttentionRoute.held`."""
        return self.route.held(self)

    def __getstate__(self) -> dict:
        """Nothing: a model may be copied or saved whole while it streams, and the copy's hook serves no cache.

        Hooks are copied before the submodules and the configuration, which are set right here.
        """
        if self.decoder() is not None:
            self.route.clean_up()
        return {}

    def cache_in(self, decoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple["StreamingCache | None", dict]:
        """This hook's cache if the call brings it, and all arguments by name."""
        if decoder is not self.decoder():  # a copy of the model
            return None, kwargs
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = self.cache()
        is_given = cache is not None and any(value is cache for value in named.values())  # under any name
        return (cache if is_given else None), named

    def before(self, decoder: PreTrainedModel, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        if kwargs is None or decoder is not self.decoder():  # none: the cache was collected while torch called hooks
            return None
        if STEERED not in kwargs:  # else another hook has just entered for this pass
            self.route.clean_up()
        cache, named = self.cache_in(decoder, args, kwargs)
        if cache is None:
            return None
        is_users_graph = torch.compiler.is_compiling() and not self.route.is_held
        return (self.steer_outside_graph if is_users_graph else self.steer)(decoder, cache, named)

    @torch.compiler.disable
    def steer_outside_graph(self, *call: Any) -> tuple[tuple, dict]:
        """For a model that the user compiled: a graph can neither look at a mask nor move phases back."""
        return self.steer(*call)

    def steer(self, decoder: PreTrainedModel, cache: "StreamingCache", named: dict) -> tuple[tuple, dict]:
        """Run all chunks but the last; the arguments ``named`` as they must be for the last."""
        self.earlier.append([])
        name = "inputs_embeds" if named.get("input_ids") is None else "input_ids"
        inputs: Any = named.get(name)
        is_token = named.get("attention_mask")
        if len(self.earlier) == 1:
            check_call(self.route, inputs, named)
            is_token = cache.check_inputs(inputs, is_token)
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
        position_ids = cache.begin_forward(inputs, is_token, is_rest=bool(self.earlier[-1]))
        self.route.enter(self)
        mask = identity_mask(self.adapter, inputs.shape[0], inputs.device)
        if self.adapter is not None and self.adapter.takes_positions_from_cache:
            position_ids = torch.zeros_like(position_ids)
        steered = {name: inputs, "attention_mask": mask, "position_ids": position_ids, STEERED: cache}
        return (), {**named, **steered}

    def after(self, decoder: PreTrainedModel, args: tuple, *kwargs_and_output: Any) -> Any:
        if len(kwargs_and_output) == 1:  # as in `before`
            return None
        kwargs, output = kwargs_and_output
        cache, _ = self.cache_in(decoder, args, kwargs)
        if cache is None:
            return None
        self.route.leave()
        cache.end_forward(succeeded=output is not None)
        earlier = self.earlier.pop() if self.earlier else []
        return join_outputs([*earlier, output]) if earlier and output is not None else None


def check_call(route: AttentionRoute, inputs: Tensor | None, named: dict) -> None:
    """Refuse what a steered pass cannot do."""
    if inputs is None or inputs.shape[1] == 0:
        raise ValueError(
            "no new tokens for this StreamingCache: `generate` wants the whole text so far, what is in the cache "
            "included, and then the new turn"
        )
    if named.get("use_cache") is False:  # then `generate` would feed the whole text again at each step
        raise ValueError("use_cache is False, yet a StreamingCache is given: pass use_cache=True")
    if named.get("output_attentions") or getattr(route.config, "output_attentions", False):
        raise ValueError("a StreamingCache gives no attention weights: leave output_attentions off")


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
