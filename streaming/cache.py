"""`StreamingCache`: a transformers cache that holds S initial and W recent tokens, whatever the length of the text."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .buffers import StreamingLayer, select_rows, static_copy, static_zeros
from .encodings import Rotary
from .families import family_of
from .rule import StreamShape
from .steering import SteeredForward
from .steps import ChunkStep, DecodeStep


@dataclass
class StreamCounters:
    """How far the streams of a batch have come, on the device, so that a compiled step can count.

    ``num_seen`` ``(B,)``: tokens of each row. ``base`` ``(B,)``: the token that has phase 0. ``num_columns`` ``()``:
    inputs taken, padding included, which is the length that transformers asks for.
    """

    num_seen: Tensor
    base: Tensor
    num_columns: Tensor

    @classmethod
    def start(cls, batch_size: int, device: torch.device) -> "StreamCounters":
        return cls(*(static_zeros(shape, torch.long, device) for shape in ((batch_size,), (batch_size,), ())))

    def __deepcopy__(self, memo: dict) -> "StreamCounters":
        return StreamCounters(*(static_copy(tensor) for tensor in (self.num_seen, self.base, self.num_columns)))

    def map_rows(self, rows: Tensor) -> None:
        self.num_seen, self.base = select_rows(self.num_seen, rows), select_rows(self.base, rows)


class StreamingCache(Cache):
    """Constant-memory streaming with kept initial tokens (StreamingLLM, Xiao et al. 2024).

    ::

        cache = StreamingCache.for_model(model, num_kept=4, window=1020)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=100_000)

    The cache belongs to one model and one batch of streams. It takes tokens in forward passes of any length, one by
    one or a whole book, with the same result. Padding in the ``attention_mask`` is no token of a stream. For
    inference only.
    """

    def __init__(self, model: PreTrainedModel, shape: StreamShape, chunk_size: int):
        decoder: Any = model.get_decoder()
        devices = sorted({str(parameter.device) for parameter in decoder.parameters()})
        if len(devices) > 1:
            raise ValueError(f"the model lies on several devices ({', '.join(devices)}): move it to one to stream it")
        family = family_of(decoder.config, shape)
        layers = [StreamingLayer(shape) for _ in range(decoder.config.num_hidden_layers)]
        super().__init__(layers=layers)
        self.streaming_layers = layers
        self.decoder, self.shape, self.chunk_size = decoder, shape, chunk_size
        self.encoding = family.encoding(decoder, shape)
        self.counters: StreamCounters | None = None
        self.step: DecodeStep | ChunkStep | None = None  # the pass under way
        self.num_since_rebase = 0
        self.is_ragged = False  # rows have seen different numbers of tokens
        self.is_damaged = False  # a pass was broken off: some layers have read its tokens and some have not
        self.adapter = family.adapter
        modules = family.adapter.modules(decoder) if family.adapter else []
        attend = family.adapter.attend if family.adapter else None
        self.substitutes = [(module, partial(attend, weakref.ref(self), module)) for module in modules if attend]
        self.steering = SteeredForward.of(self, decoder)

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, *, num_kept: int, window: int, chunk_size: int = 1024
    ) -> "StreamingCache":
        """An empty cache for a model.

        Args:
            num_kept: initial tokens that stay for ever (S); a model's own sink tokens count.
            window: recent tokens that stay besides the newest (W). "4+1020" is ``num_kept=4, window=1020``.
            chunk_size: longest piece of a prompt that is computed at once; bounds memory, not the result.

        Raises:
            ValueError: a model that cannot stream, ``num_kept < 0``, ``window < 1`` or ``chunk_size < 1``.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
        return cls(model, StreamShape(num_kept, window), chunk_size)

    def __repr__(self) -> str:
        shape = self.shape
        return f"StreamingCache(num_kept={shape.num_kept}, window={shape.window}, seen={self.get_seq_length()})"

    def __deepcopy__(self, memo: dict) -> "StreamingCache":
        """Another cache of the same model that goes on from the same tokens: a prompt read once serves many texts."""
        twin = StreamingCache(self.decoder, self.shape, self.chunk_size)
        for name in ("counters", "num_since_rebase", "is_ragged", "is_damaged"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin.streaming_layers = copy.deepcopy(self.streaming_layers, memo)
        twin.layers = twin.streaming_layers
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a StreamingCache belongs to the model beside it and can be neither saved nor copied by copy.copy: "
            "copy.deepcopy(cache) makes a cache that goes on from the same tokens"
        )

    # -- a forward pass, as `SteeredForward` drives it ---------------------------------------------------------------

    def check_whole(self) -> None:
        """Refuse to continue after a pass that was broken off."""
        if self.is_damaged:
            raise ValueError("the last forward pass with this StreamingCache failed midway: call reset() first")

    @torch.compiler.disable
    def check_inputs(self, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which of the new inputs ``(B, T, …)`` are tokens ``(B, T)``, None if all; refuses what cannot stream."""
        self.check_whole()
        batch_size, num_inputs = inputs.shape[:2]
        if self.counters is not None and self.batch_size != batch_size:
            raise ValueError(
                f"this StreamingCache holds {self.batch_size} streams and the batch has {batch_size} rows: "
                "call reset(), or make a new cache"
            )
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] < num_inputs:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: a StreamingCache takes a (batch, tokens) mask that "
                f"covers at least the {num_inputs} new tokens of {batch_size} rows"
            )
        is_token = mask[:, -num_inputs:].bool()
        if is_token.all():
            return None
        if (is_token.any(-1) & ~is_token[:, -1]).any():  # a row may have no token at all
            raise ValueError("the batch is padded on the right, where a stream continues: pad it on the left")
        self.is_ragged = True
        return is_token

    @contextmanager
    def damaged_by_failure(self, num_inputs: int) -> Iterator[None]:
        """Mark the cache if a pass over so many inputs fails. A single token that fails is overwritten by the next."""
        try:
            yield
        except BaseException:
            self.is_damaged |= num_inputs > 1
            raise
        finally:
            self.step = None

    @torch.compiler.disable
    def begin_chunk(self, inputs: Tensor, is_token: Tensor | None) -> Tensor:
        """`begin_pass`, after moving phases back if that is due, which a graph cannot do."""
        self.rebase_before(inputs.shape[1])
        return self.begin_pass(inputs, is_token)

    @torch.compiler.disable
    def end_chunk(self) -> None:
        self.end_pass()

    def begin_pass(self, inputs: Tensor, is_token: Tensor | None) -> Tensor:
        """Prepare a pass over inputs ``(B, T, …)``, of which ``is_token`` ``(B, T)`` are no padding.

        Returns:
            their position ids ``(B, T)``.
        """
        batch_size, num_inputs = inputs.shape[:2]
        if self.counters is None:
            self.counters = StreamCounters.start(batch_size, inputs.device)
        num_seen, base = self.counters.num_seen, self.counters.base
        context = (self.streaming_layers, self.shape, self.encoding)
        if num_inputs == 1:
            self.step = DecodeStep(*context, num_seen, base, is_token)
        else:
            rows = slice(None) if self.is_ragged else slice(1)
            self.step = ChunkStep(*context, num_seen[rows], base[rows], num_inputs, is_token)
        return self.step.position_ids.expand(batch_size, -1)

    def end_pass(self) -> None:
        """Count the tokens that the pass has read."""
        step, self.step = self.step, None
        assert step is not None
        assert self.counters is not None
        self.counters.num_seen += step.num_new
        self.counters.num_columns += step.num_inputs

    def rebase_before(self, num_inputs: int) -> None:
        """Count inputs to come, and `rebase` first if it is due.

        Every pass does it by itself. A pass that was compiled cannot: who runs one calls this before each token.
        """
        if self.num_since_rebase + num_inputs > self.shape.window + 1:
            try:
                self.rebase()
            except BaseException:  # some layers have been moved and some have not
                self.is_damaged = True
                raise
        self.num_since_rebase += num_inputs

    @torch.no_grad()
    def rebase(self) -> None:
        """Move all phases back, so that the window begins at phase S and float32 angles stay sharp for ever.

        Happens once a window, so that a key is turned back at most once while it is in use and not even bfloat16 has
        rounding to pile up.
        """
        self.num_since_rebase = 0
        if self.counters is None:
            return
        base = (self.counters.num_seen - self.shape.num_slots).clamp(min=0)
        rings = [layer.keys[:, :, self.shape.num_kept :] for layer in self.streaming_layers if layer.is_allocated]
        if isinstance(self.encoding, Rotary) and rings:
            back = (self.counters.base - base)[:, None]
            phases = self.encoding.phases(back, like=rings[0])
            for ring in rings:
                ring.copy_(self.encoding.turn(ring, phases))
        self.counters.base.copy_(base)

    # -- the interface of transformers' caches -----------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Pass the new states on to `streaming_attention`, which stores them."""
        if self.step is None:
            raise ValueError(
                "this StreamingCache was made for another model: StreamingCache.for_model(model, …) makes one for this"
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Inputs taken so far, padding and sinks included: not the number of keys held.

        While a graph is traced only whether the cache is empty is known, and a cache with a past says 1.
        """
        if self.counters is None:
            return 0
        return 1 if torch.compiler.is_compiling() else int(self.counters.num_columns)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no end."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """False: `generate` shall not compile on its own account."""
        return False

    @property
    def is_initialized(self) -> bool:
        return self.counters is not None

    @property
    def is_croppable(self) -> bool:
        """False: a token that has left the window cannot come back. See `crop`."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.streaming_layers)

    @property
    def batch_size(self) -> int:
        """Streams held, -1 if none have begun."""
        return -1 if self.counters is None else self.counters.num_seen.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values held, constant once the first tokens are read."""
        return sum(layer.num_bytes for layer in self.streaming_layers)

    def reset(self) -> None:
        """Forget the streams; the next forward pass begins new ones, of any batch size."""
        self.counters = self.step = None
        self.is_ragged = self.is_damaged = False
        self.num_since_rebase = 0
        for layer in self.streaming_layers:
            layer.free()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number, as long as none has left the cache.

        Raises:
            ValueError: the number is positive, a token before them has already left the cache, or there has been
                padding, which takes no place in the cache, so that rows cannot be cut at the same input.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to take back as a negative number")
        if self.counters is None or tokens_to_remove == 0:
            return
        if self.is_ragged:
            raise ValueError("cannot take tokens back from a batch that has had padding: call reset() and read it anew")
        if int(self.counters.num_seen.max()) > self.shape.num_slots:
            raise ValueError(
                f"cannot take tokens back: of the {int(self.counters.num_seen.max())} seen, the first beyond the "
                f"{self.shape.num_kept} kept ones have left the cache, and the window cannot be filled up again; "
                "assisted generation and prompt lookup take tokens back: leave them off, or use a larger window"
            )
        if -tokens_to_remove > int(self.counters.num_seen.min()):
            raise ValueError(
                f"crop({tokens_to_remove}): only {int(self.counters.num_seen.min())} tokens have been seen"
            )
        self.counters.num_seen += tokens_to_remove
        self.counters.num_columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the stream of row ``beam_idx[i]`` (beam search)."""
        if self.counters is not None:
            self.counters.map_rows(beam_idx)
            for layer in self.streaming_layers:
                layer.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every stream ``repeats`` times."""
        if self.counters is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams only."""
        self.reorder_cache(indices)
