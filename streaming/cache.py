"""`StreamingCache`: a transformers cache that keeps S initial and W recent tokens of any text."""

import copy
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..models.config import num_prepended_sinks
from .advice import refuse_constructor, refuse_without_weights, warn_if_untrained
from .buffers import StreamingLayer
from .continuing import check_generation
from .families import family_of, num_equal_positions
from .layers import LayerPlan, own_rules
from .masks import check_padding, which_are_tokens
from .memory import MemoryOptions, StreamMemory
from .quantized import KV_DTYPES, NUM_RECENT, QuantizedLayer, check_head_sizes
from .rule import StreamShape, whole_number
from .saving import load_cache, save_cache
from .steering import SteeredForward, configs_of
from .steps import Pass
from .streams import Streams
from .wrappers import decoder_of


class StreamingCache(Cache):
    """Constant-memory streaming with kept initial tokens (StreamingLLM, Xiao et al. 2024).

    ::

        cache = StreamingCache.for_model(model, num_kept=4, window=1020)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=100_000)

    The cache belongs to one model and one batch of streams. Forward passes may have any length,
    from one token to a whole book, with the same result (but for rounding if keys and values are
    quantized). Padding in the ``attention_mask`` is not
    part of a stream. For inference only.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> "StreamingCache":
        refuse_constructor(arguments)
        return super().__new__(cls)

    def __init__(
        self,
        model: PreTrainedModel,
        shape: StreamShape,
        chunk_size: int,
        kv_dtype: str | None = None,
        memory: MemoryOptions | None = None,
    ):
        decoder = decoder_of(model)
        refuse_without_weights(decoder)
        if kv_dtype is not None:
            check_head_sizes(decoder.config, kv_dtype)
        family = family_of(decoder.config, shape)
        plan = LayerPlan.of(decoder, shape, family.encoding)
        new_layer = StreamingLayer if kv_dtype is None else partial(QuantizedLayer, kv_dtype)
        layers = [new_layer(plan.group(i).shape, plan.has_positions(i)) for i in range(plan.num_layers)]
        super().__init__(layers=layers)
        self.streams = Streams(plan, layers)
        self.model, self.decoder, self.shape, self.plan = model, decoder, shape, plan
        self.memory = None if memory is None else StreamMemory.of(memory, plan, own_rules(decoder.config), layers)
        self.chunk_size = min(chunk_size, num_equal_positions(decoder.config) - plan.num_slots)
        self.kv_dtype = kv_dtype
        self.step: Pass | None = None  # the current pass
        self.inputs: tuple[Tensor, Tensor | None] | None = None  # of the current pass, and which are tokens
        self.next_ids: Tensor | None = None  # of the next pass, as far as `generate` has named them
        self.is_damaged = False  # a pass was interrupted: some layers have read its tokens, some have not
        self.adapter = family.adapter
        modules = family.adapter.modules(decoder) if family.adapter else []
        attend = family.adapter.attend if family.adapter else None
        self.substitutes = [(module, partial(attend, weakref.ref(self), module)) for module in modules if attend]
        self.configs = configs_of(decoder)
        self.steering = SteeredForward.of(self, decoder)
        check_generation(model)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        num_kept: int,
        window: int,
        chunk_size: int = 1024,
        kv_dtype: Literal["int8", "int4"] | None = None,
        memory: MemoryOptions | None = None,
    ) -> "StreamingCache":
        """Create an empty cache for a model.

        Args:
            num_kept: number of initial tokens that are never evicted (S), including the model's own
                sink tokens.
            window: number of recent tokens that stay in the cache after each step (W). "4+1020" is
                ``num_kept=4, window=1020``.
            chunk_size: maximum number of tokens of a prompt per forward pass. It bounds the memory
                and does not change the result.
            kv_dtype: store keys and values with 8 or 4 bits, except those of the kept tokens and of
                the last 32. None stores them as they are. With a window above 32, passes of other
                lengths then give slightly different results: within a pass, tokens see each other
                in full precision.
            memory: also see blocks of tokens that have left the window, which are kept in host
                memory. That memory grows with the stream, the device's does not.

        Warns:
            UserWarning: the cache has more positions than the model was trained on, or fewer kept
                tokens than its windowed layers.

        Raises:
            TypeError: ``model`` is a name, or ``memory`` is no `MemoryOptions`.
            ValueError: the model is not supported, ``num_kept``, ``window`` or ``chunk_size`` is no
                whole number or too small, an unknown ``kv_dtype``, or ``"int4"`` for an odd head
                size, or a ``kv_dtype`` with windows of at most 32 tokens, which would quantize
                nothing, or a memory with a ``kv_dtype``, with blocks longer than the window, or for
                a model without rotary positions.
        """
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype is {kv_dtype!r}: it must be {', '.join(map(repr, KV_DTYPES))} or None")
        chunk_size = whole_number("chunk_size", chunk_size, at_least=1)
        if not isinstance(memory, MemoryOptions | None):
            raise TypeError(f"memory is {memory!r}: pass MemoryOptions(…)")
        if kv_dtype is not None and memory is not None:
            raise ValueError(
                "a cache has either a memory or quantized keys and values: use memory=None or kv_dtype=None"
            )
        cache = cls(model, StreamShape(num_kept, window), chunk_size, kv_dtype, memory)
        if kv_dtype is not None and cache.plan.window <= NUM_RECENT:
            raise ValueError(
                f"kv_dtype={kv_dtype!r} would quantize nothing: the last {NUM_RECENT} tokens are exact, and no layer "
                f"has a window of more than {cache.plan.window} tokens: use kv_dtype=None or a larger window"
            )
        warn_if_untrained(model, cache.shape, cache.plan.num_slots - 1, 0 if memory is None else memory.block_size)
        return cache

    def __repr__(self) -> str:
        shape, own = self.shape, "".join(f", {layers}" for layers in self.plan.own_shapes)
        kind = "" if self.kv_dtype is None else f", kv_dtype={self.kv_dtype!r}"
        memory = "" if self.memory is None else f", memory={self.memory.options}"
        seen = f"seen={self.get_seq_length()}"
        return f"StreamingCache(num_kept={shape.num_kept}, window={shape.window}{own}{kind}{memory}, {seen})"

    def __deepcopy__(self, memo: dict) -> "StreamingCache":
        """Copy the streams to a new cache of the same model.

        A prompt that was read once can thus be continued several times.
        """
        options = None if self.memory is None else self.memory.options
        twin = StreamingCache(self.model, self.shape, self.chunk_size, self.kv_dtype, options)
        twin.streams = copy.deepcopy(self.streams, memo)
        twin.layers = twin.streams.layers
        twin.memory = None if options is None else StreamMemory(options, twin.streams.layers)
        twin.is_damaged = self.is_damaged
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a StreamingCache is tied to its model and can be neither pickled nor copied with copy.copy: use "
            "cache.save(path) for a file, or copy.deepcopy(cache) for a second cache with the same tokens"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Save the streams to a safetensors file, from which `load` continues them.

        An older file is replaced when the new one is complete.

        Raises:
            ValueError: an earlier pass was interrupted, or one is running.
            OSError: the file cannot be written.
        """
        save_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> "StreamingCache":
        """Return a cache with the streams of a file of `save`.

        Args:
            model: the model that has read the streams, on any device.

        Raises:
            ValueError: the file is damaged, or was saved with a model of another configuration,
                other weights or another dtype.
            OSError: the file cannot be read.
        """
        return load_cache(Path(path), model)[0]

    # -- One forward pass, called by `SteeredForward` --------------------------------------------

    def check_whole(self) -> None:
        """Raise a ValueError if an earlier pass was interrupted."""
        if self.is_damaged:
            raise ValueError(
                "an earlier forward pass with this StreamingCache failed midway: call reset() and read the text again"
            )

    @torch.compiler.disable
    def check_inputs(self, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return which of the inputs ``(B, T, …)`` are tokens ``(B, T)``, None if all are.

        Raises:
            ValueError: the cache is damaged, the batch size has changed, or the mask has the wrong
                shape or values, or pads on the right.
        """
        self.check_whole()
        batch_size, num_inputs = inputs.shape[:2]
        if not self.streams.is_empty and self.batch_size != batch_size:
            times, rest = divmod(batch_size, self.batch_size)
            repeat = "" if rest else f"batch_repeat_interleave({times}) to continue each stream in {times} rows, "
            raise ValueError(
                f"this StreamingCache has {self.batch_size} streams, but the batch has {batch_size} rows: call "
                f"{repeat}reset() for new texts, or create a new cache"
            )
        is_token = None if mask is None else which_are_tokens(mask, batch_size, num_inputs)
        if is_token is None:
            return None
        if self.memory is not None:
            raise ValueError("a StreamingCache with a memory does not support padding: use texts of the same length")
        num_new_sinks = num_prepended_sinks(self.decoder.config) if self.streams.is_empty else 0
        check_padding(is_token[:, num_new_sinks:])  # the model adds its sinks to the mask
        self.streams.is_ragged = True
        return is_token

    def ids_of(self, inputs: Tensor) -> Tensor:
        """Return the ids of embeddings that a model of text and images made in `generate`.

        All other inputs are returned as they are.
        """
        ids, self.next_ids = self.next_ids, None
        if ids is None or not inputs.is_floating_point() or ids.shape != inputs.shape[:2]:
            return inputs
        return ids.to(inputs.device)

    @contextmanager
    def damaged_by_failure(self, num_inputs: int) -> Iterator[None]:
        """Mark the cache as damaged if a pass over ``num_inputs`` inputs fails.

        A pass over one token does no damage: the next token overwrites it. If it is the first one,
        the cache is empty again.
        """
        was_empty = self.streams.is_empty
        try:
            yield
            self.streams.has_failed = False
        except BaseException:
            self.streams.has_failed = True
            self.is_damaged |= num_inputs > 1
            if self.memory is not None:
                self.memory.num_seen = None
            if was_empty and num_inputs == 1:
                self.reset()
            raise
        finally:
            self.step = self.inputs = None

    @torch.compiler.disable
    def begin_chunk(self, inputs: Tensor, is_token: Tensor | None) -> Tensor:
        """Rebase if necessary, which is not possible in a graph, and call `begin_pass`."""
        self.rebase_before(inputs.shape[1])
        return self.begin_pass(inputs, is_token)

    @torch.compiler.disable
    def end_chunk(self) -> None:
        self.end_pass()

    def begin_pass(self, inputs: Tensor, is_token: Tensor | None) -> Tensor:
        """Prepare a pass over inputs ``(B, T, …)`` and return their position ids ``(B, T)``.

        Args:
            is_token: ``(B, T)``, False for padding; None if there is no padding.
        """
        self.step = self.streams.begin_pass(inputs, is_token)
        self.inputs = inputs, is_token
        return self.step.position_ids.expand(inputs.shape[0], -1)

    def end_pass(self) -> None:
        """Add the tokens of the pass to the counters."""
        step, self.step = self.step, None
        assert step is not None
        assert self.inputs is not None
        step.check_attended()
        self.streams.end_pass(step, *self.inputs)
        self.inputs = None

    def rebase_before(self, num_inputs: int) -> None:
        """Count the next ``num_inputs`` inputs, after a rebase if one is due; update the memory.

        Eager passes call this automatically. For a compiled pass, call it before each token.
        """
        try:
            self.streams.rebase_before(num_inputs)
        except BaseException:  # some layers are rebased, some are not
            self.is_damaged = True
            raise
        if self.memory is not None:
            self.memory.before_pass(self.streams.counters, num_inputs)

    # -- The interface of transformers' caches ---------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Return the new states unchanged: `streaming_attention` stores them."""
        if self.step is None:
            raise ValueError(
                "this StreamingCache was made for another model, or the model's forward method was replaced since: "
                "create a new one with StreamingCache.for_model(model, …)"
            )
        self.step.check_attended()
        self.step.is_waiting = True
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of inputs seen, including padding and sinks; not the number of keys in the cache.

        While a graph is traced, a cache that is not empty returns 1.
        """
        if self.streams.counters is None:
            return 0
        return 1 if torch.compiler.is_compiling() else int(self.streams.counters.num_columns)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of keys in a mask, and which is the first.

        Models of text and images make masks, see `masks.text_mask`. These have the new inputs only,
        so that they do not grow with the stream.
        """
        return query_length, self.get_seq_length()

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile the model."""
        return False

    @property
    def is_initialized(self) -> bool:
        return not self.streams.is_empty

    @property
    def is_croppable(self) -> bool:
        """Whether no token has left the cache, so that `crop` is possible (assisted generation)."""
        if self.streams.is_empty:
            return True
        # On MPS, `generate` would remove a token after each step, also when the cache is full.
        return not (self.streams.has_evicted or self.streams.is_ragged or self.decoder.device.type == "mps")

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.streams.layers)

    @property
    def batch_size(self) -> int:
        """Number of streams, -1 if the cache is empty."""
        return self.streams.batch_size

    @property
    def num_bytes(self) -> int:
        """Memory on the devices in bytes, constant after the first forward pass.

        With a memory, the scores of its blocks grow with the stream.
        """
        own = 0 if self.memory is None else self.memory.num_bytes
        return own + sum(layer.num_bytes for layer in self.streams.layers)

    @property
    def num_host_bytes(self) -> int:
        """Host memory that is allocated for blocks, in bytes; it grows with the stream."""
        return 0 if self.memory is None else self.memory.num_host_bytes

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Empty the cache. The next forward pass starts new streams, with any batch size.

        Args:
            rows: numbers of the only rows of the batch to empty. The others continue.

        Raises:
            ValueError: ``rows`` are not integers from 0 to B - 1, or the model has sink tokens that
                the cache does not keep. They cannot be read again for some rows only.
        """
        if rows is not None:
            self._reset_rows(rows)
            return
        self.step = None
        self.is_damaged = False
        self.streams.clear()

    def _reset_rows(self, rows: Sequence[int] | Tensor) -> None:
        self.check_whole()
        if self.memory is not None:
            raise ValueError("rows of a StreamingCache with a memory cannot be reset on their own: reset all rows")
        if self.streams.is_empty:
            return
        sink_ids = getattr(self.decoder.config, "sink_token_ids", [])
        if len(sink_ids) > self.shape.num_kept:
            raise ValueError(
                f"the model has {len(sink_ids)} sink tokens, of which the cache keeps {self.shape.num_kept}: reset all "
                "rows, or use a cache with a larger num_kept"
            )
        self.streams.restart_rows(rows, sink_ids)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as long as no token has left the cache.

        Args:
            tokens_to_remove: number of tokens, negative as in transformers.

        Raises:
            ValueError: the number is positive or larger than the number of tokens seen, a token has
                left the cache, or there was padding. Padding is not stored, so the rows could not
                be cut at the same input.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        if tokens_to_remove == 0:
            return
        self.streams.remove_last(-tokens_to_remove)
        if self.memory is not None and self.streams.counters is not None:
            self.memory.crop(int(self.streams.counters.num_seen[0]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the stream of row ``beam_idx[i]`` (beam search)."""
        self.streams.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every stream ``repeats`` times."""
        if not self.streams.is_empty:
            self.streams.map_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these streams."""
        self.streams.map_rows(indices)
