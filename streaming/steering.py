"""Routes the forward passes with a streaming cache to that cache.

A cache alone cannot implement streaming: it receives keys that already have a position chosen by
the model, and never sees the queries. While a decoder has streaming caches, `SteeredForward`
therefore replaces its ``forward`` method. A call with one of these caches runs in chunks, with
positions from the cache and with attention computed by the cache. All other calls use the decoder's
own method.
"""

import copy
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..models.attention import register_column_attention, register_window_attention, score_dtype
from ..models.cache_argument import NAMES
from ..models.sink_column import SinkColumn
from .adapters import STEERED, identity_mask
from .masks import text_mask

if TYPE_CHECKING:
    from .cache import StreamingCache

ATTENTION = "sinklm_streaming"  # value of ``attn_implementation``
HARMLESS = {  # arguments of attention functions that do not change a streaming pass
    *("dropout", "sliding_window", "position_ids", "cache_position", "num_items_in_batch", "logits_to_keep"),
    *("position_embeddings", "token_type_ids", "mm_token_type_ids", *NAMES),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("tokenizer", "assistant_tokenizer"),  # of `generate`, which passes them on
}
NEEDED_PARAMETERS = ("input_ids", "inputs_embeds", "attention_mask")


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
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface for passes with a streaming cache.

    Args:
        query, key, value: ``(B, H, T, D)``.
        column: the sink of a model of sinklm.
        s_aux: sink logits ``(H,)`` of gpt-oss and similar models.
        softcap: limit of the scores (Gemma 2).

    Returns:
        The output ``(B, T, H, D)`` and None.

    Raises:
        ValueError: the model passes another argument, which may change the attention.
    """
    assert streaming_cache.step is not None
    refuse_unknown(module, kwargs)
    if s_aux is not None:
        column = SinkColumn(s_aux.to(score_dtype(query))[:, None])
    out = streaming_cache.step.attend(module.layer_idx, query, key, value, scaling, column, softcap)
    return out.transpose(1, 2).contiguous(), None


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for arguments of an attention function that are not known to be harmless.

    Models pass biases, indices and more to their attention, and it would be wrong to ignore them.
    """
    for name, value in kwargs.items():
        if name not in HARMLESS and value is not None and value is not False:
            raise ValueError(
                f"streaming does not support {type(module).__name__}: it passes {name!r} to its attention function, "
                "which a StreamingCache does not know"
            )


AttentionInterface.register(ATTENTION, streaming_attention)
register_column_attention(ATTENTION, streaming_attention)
register_window_attention(ATTENTION)  # the cache has the windows of the layers


class SteeredForward:
    """Replaces a decoder's ``forward`` method; all streaming caches of a decoder share one.

    A deep copy of the decoder gets its own, without caches; a pickled decoder gets the original
    method. A shallow copy, and a replica of ``torch.nn.DataParallel``, would run this decoder:
    delete the caches first.

    A pass with a cache changes the decoder until it ends, so passes of several threads take turns.
    Passes that began before the first cache are not protected, nor is what `generate` does between
    passes.
    """

    def __init__(self, decoder: PreTrainedModel):
        self.decoder = weakref.ref(decoder)
        self.replaced = vars(decoder).get("forward")  # set on the instance, for example by accelerate
        self.parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.num_caches = 0
        self.is_routed = False
        self.lock = threading.RLock()
        if missing := set(NEEDED_PARAMETERS) - set(self.parameters):
            raise ValueError(
                f"streaming does not support {type(decoder).__name__} of transformers {transformers.__version__}: its "
                f"forward method has no argument {sorted(missing)[0]}. Install a version that sinklm was tested with"
            )

    @classmethod
    def of(cls, cache: "StreamingCache", decoder: PreTrainedModel) -> "SteeredForward":
        """Replace a decoder's ``forward`` method for the lifetime of a new cache."""
        steering = vars(decoder).get("forward")
        if not isinstance(steering, cls) or steering.decoder() is not decoder:
            steering = cls(decoder)
            decoder.forward = steering
        steering.num_caches += 1
        weakref.finalize(cache, steering.release)
        return steering

    def release(self) -> None:
        """Unregister a deleted cache. With the last one, the decoder's own method is restored."""
        self.num_caches -= 1
        decoder = self.decoder()
        if self.num_caches or decoder is None or vars(decoder).get("forward") is not self:
            return
        if self.replaced is None:
            del decoder.forward
        else:
            decoder.forward = self.replaced

    def __deepcopy__(self, memo: dict) -> Any:
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        return SteeredForward(memo[id(self.decoder())])

    def __reduce__(self) -> Any:
        return getattr, (self.decoder(), "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder's forward pass."""
        if torch.compiler.is_compiling():  # a lock cannot be traced
            return self.run(args, kwargs)
        with self.lock:
            return self.run(args, kwargs)

    def run(self, args: tuple, kwargs: dict) -> Any:
        """Run the decoder's forward pass with the cache among the arguments, or without one."""
        cache, named = self.cache_in(args, kwargs)
        if cache is None:
            return self.call_decoder(*args, **kwargs)
        if self.is_routed:
            return self.step_in_graph(cache, named)
        return self.stream(cache, named)

    def cache_in(self, args: tuple, kwargs: dict) -> tuple["StreamingCache | None", dict]:
        """Return this decoder's cache among the arguments, or None, and all arguments by name."""
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if STEERED not in named:
            for value in named.values():
                if getattr(value, "steering", None) is self:
                    return value, named
        return None, named

    def call_decoder(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        decoder: Any = self.decoder()
        return type(decoder).forward(decoder, *args, **kwargs)

    @torch.compiler.disable(recursive=False)  # the decoder's own passes are still compiled if the user compiled it
    def stream(self, cache: "StreamingCache", named: dict) -> Any:
        """Run the new inputs through the decoder in chunks. A failure midway damages the cache."""
        _, inputs = inputs_of(named)
        check_call(inputs, named, cache)
        ids = cache.ids_of(inputs)
        is_token = cache.check_inputs(inputs, text_mask(named.get("attention_mask"), inputs.shape[1]))
        outputs = []
        with self.routed(cache), cache.damaged_by_failure(inputs.shape[1]):
            for start in range(0, inputs.shape[1], cache.chunk_size):
                part = slice(start, start + cache.chunk_size)
                position_ids = cache.begin_chunk(ids[:, part], None if is_token is None else is_token[:, part])
                chunk = steered(cache, part_of(named, inputs, part), position_ids)
                outputs.append(self.call_decoder(**chunk))
                cache.end_chunk()
        return join_outputs(outputs, inputs.shape[0])

    def step_in_graph(self, cache: "StreamingCache", named: dict) -> Any:
        """Run one token of each stream in the graph of a `StreamingDecoder`.

        The decoder checks the inputs and routes the attention before it runs the graph.
        """
        _, inputs = inputs_of(named)
        position_ids = cache.begin_pass(inputs, None)
        output = self.call_decoder(**steered(cache, named, position_ids))
        cache.end_pass()
        return output

    @contextmanager
    def routed(self, cache: "StreamingCache") -> Iterator[None]:
        """Route the decoder's attention to a cache."""
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            for module, substitute in cache.substitutes:
                stack.enter_context(replaced_forward(module, substitute))
            for config in cache.configs:
                stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = ATTENTION  # also keeps the decoder from building masks
            yield

    @contextmanager
    def in_graph(self, cache: "StreamingCache") -> Iterator[None]:
        """Run the passes in this context as those of a graph, see `step_in_graph`."""
        with self.routed(cache):
            self.is_routed = True
            try:
                yield
            finally:
                self.is_routed = False


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's ``forward`` method within a context."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def configs_of(decoder: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs of a decoder's modules. Copies of layers have their own."""
    found = (getattr(module, "config", None) for module in decoder.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def inputs_of(named: dict) -> tuple[str, Any]:
    """Return the name and the value of the argument with the inputs ``(B, T, …)``."""
    name = "inputs_embeds" if named.get("input_ids") is None else "input_ids"
    return name, named.get(name)


def part_of(named: dict, inputs: Tensor, part: slice) -> dict:
    """Return the arguments of a pass over a part of its inputs.

    Cut those with a value for each input, such as ``per_layer_inputs`` of Gemma 3n and 4.
    """
    return {
        name: value[:, part] if isinstance(value, Tensor) and value.shape[:2] == inputs.shape[:2] else value
        for name, value in named.items()
    }


def steered(cache: "StreamingCache", named: dict, position_ids: Tensor) -> dict:
    """Return the arguments of a pass that is routed to a cache."""
    _, inputs = inputs_of(named)
    if cache.adapter is not None and cache.adapter.takes_positions_from_cache:
        position_ids = torch.zeros_like(position_ids)
    mask = identity_mask(cache.adapter, inputs.shape[0], inputs.device)
    if "logits_to_keep" in named:  # Gemma 4 would leave out queries in its last layers
        named = {**named, "logits_to_keep": 0}
    return {**named, "attention_mask": mask, "position_ids": position_ids, STEERED: cache}


def check_call(inputs: Tensor | None, named: dict, cache: "StreamingCache") -> None:
    """Raise a ValueError if a streaming pass does not support the arguments."""
    config: PreTrainedConfig = cache.decoder.config
    if inputs is not None and inputs.ndim < 2:
        raise ValueError(f"the inputs have shape {tuple(inputs.shape)}: pass ids of shape (batch, tokens)")
    is_empty = inputs is None or 0 in inputs.shape[:2]
    if cache.streams.is_empty and is_empty:
        raise ValueError("the input is empty: pass at least one token")
    if is_empty:
        raise ValueError(
            "no new tokens for this StreamingCache: pass `generate` the full sequence, that is the tokens that are "
            "already in the cache followed by the new ones"
        )
    if named.get("use_cache") is False:  # `generate` would pass the whole text again at each step
        raise ValueError("use_cache is False, but a StreamingCache was passed: pass use_cache=True")
    if named.get("window") is not None or named.get("carried") is not None:
        raise ValueError(
            "window= and carried= are for passes without a cache: create the StreamingCache with a smaller window"
        )
    if named.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError("a StreamingCache does not return attention weights: set output_attentions=False")


def join_outputs(outputs: list, batch_size: int) -> Any:
    """Join the outputs of chunks along time, see `join_values`."""
    joined = outputs[-1]
    if len(outputs) == 1:
        return joined
    if not isinstance(joined, ModelOutput):
        return join_values(outputs, batch_size)
    for name in joined:
        joined[name] = join_values([output[name] for output in outputs], batch_size)
    return joined


def join_values(values: Sequence, batch_size: int) -> Any:
    """Join states ``(…, T, D)`` and logits of routers ``(B * T, experts)``, or tuples of them.

    Other values are the last ones.
    """
    last = values[-1]
    if isinstance(last, tuple):
        return tuple(join_values(parts, batch_size) for parts in zip(*values, strict=True))
    if not isinstance(last, Tensor) or last.ndim < 2:
        return last
    if last.ndim == 2:
        return torch.cat([value.unflatten(0, (batch_size, -1)) for value in values], dim=1).flatten(0, 1)
    return torch.cat(list(values), dim=-2)
