"""`StreamingCache`: a transformers cache that holds S initial and W recent tokens, whatever the length of the text."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .contract import StreamShape
from .encodings import Alibi
from .families import family_of
from .hook import ATTENTION, StreamingHook
from .layer import StreamingLayer
from .steps import ChunkStep, DecodeStep


class StreamingCache(Cache):
    """Constant-memory streaming with kept initial tokens (StreamingLLM, Xiao et al. 2024).

    ::

        cache = StreamingCache.for_model(model, num_kept=4, window=1020)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=100_000)

    The cache belongs to one model and one batch of streams. It takes tokens in forward passes of any length, one
    by one or a whole book, with the same result. Padding in the ``attention_mask`` is no token of a stream. For
    inference only.
    """

    def __init__(self, model: PreTrainedModel, shape: StreamShape, chunk_size: int):
        decoder = model.base_model
        super().__init__(layers=[StreamingLayer(shape) for _ in range(model.config.num_hidden_layers)])
        self.shape, self.chunk_size = shape, chunk_size
        self.decoder = decoder
        self.encoding = family_of(model).encoding(decoder, shape)
        self.num_seen: Tensor | None = None  # (B,) tokens of each row's stream
        self.base: Tensor | None = None  # (B,) token that has phase 0
        self.num_columns: Tensor | None = None  # () inputs taken, padding included: the length that transformers counts
        self.is_ragged = False  # rows have seen different numbers of tokens
        self.num_since_rebase = 0
        self.step: DecodeStep | ChunkStep | None = None
        self.is_damaged = False
        self._users_attention: str | None = None
        StreamingHook(self, decoder)

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
            ValueError: a model whose positions cannot be moved, ``num_kept < 0``, ``window < 1`` or ``chunk_size < 1``.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1")
        return cls(model, StreamShape(num_kept, window), chunk_size)

    # -- a forward pass, as `StreamingHook` drives it ---------------------------------------------------------------

    def check_inputs(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Which of the new inputs are tokens ``(B, T)``, None if all; refuses what a stream cannot take."""
        if self.is_damaged:
            raise ValueError("the last forward pass with this StreamingCache failed midway: call reset() first")
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        batch_size, num_inputs = inputs.shape[:2]
        if self.num_seen is not None and self.num_seen.shape[0] != batch_size:
            raise ValueError(
                f"this StreamingCache holds {self.num_seen.shape[0]} streams and the batch has {batch_size} rows: "
                "call reset(), or make a new cache"
            )
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] < num_inputs:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: a StreamingCache takes a (batch, tokens) mask that "
                f"covers at least the {num_inputs} new tokens of {batch_size} rows"
            )
        is_token = mask[:, -num_inputs:].bool()
        if torch.compiler.is_compiling() or is_token.all():
            return None
        if num_inputs > 1 and not is_token[:, -1].all():
            raise ValueError("the batch is padded on the right, where a stream goes on: pad it on the left")
        self.is_ragged = True
        return is_token

    def begin_forward(self, batch_size: int, num_inputs: int, is_token: Tensor | None, device) -> Tensor:
        """Prepare one pass over ``(B, T)`` inputs; returns their position ids ``(B, T)``."""
        if self.num_seen is None:
            self.num_seen = torch.zeros(batch_size, dtype=torch.long, device=device)
            self.base = torch.zeros_like(self.num_seen)
            self.num_columns = torch.zeros((), dtype=torch.long, device=device)
        self._rebase_before(num_inputs)
        if num_inputs == 1:
            self.step = DecodeStep(self.shape, self.encoding, self.num_seen, self.base)
            self._num_new = 1 if is_token is None else is_token[:, 0].long()
        else:
            rows = slice(None) if self.is_ragged else slice(1)
            self.step = ChunkStep(self.shape, self.encoding, self.num_seen[rows], self.base[rows], num_inputs, is_token)
            self._num_new = self.step.num_new
        self._num_inputs = num_inputs
        self._users_attention = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation = ATTENTION
        return self.step.position_ids

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one layer ``(B, H, T, D)`` over the stream; stores the new keys and values."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.step.attend(self.layers[layer_idx], query, key, value, scaling)

    def end_forward(self, *, succeeded: bool) -> None:
        """Count what the pass has brought, and give the model back its own attention."""
        if self._users_attention is not None:
            self.decoder.config._attn_implementation = self._users_attention
            self._users_attention = None
        if succeeded:
            self.num_seen += self._num_new
            self.num_columns += self._num_inputs
        else:
            self.is_damaged |= isinstance(self.step, ChunkStep)
        self.step = None

    def _rebase_before(self, num_inputs: int) -> None:
        """Move all phases back before they grow past twice the cache, so that float32 angles stay sharp for ever.

        A key is turned back at most once while it is in the window: not even bfloat16 has rounding to pile up.
        """
        if torch.compiler.is_compiling():
            return
        if self.num_since_rebase + num_inputs > self.shape.window + 1:
            self.rebase()
        self.num_since_rebase += num_inputs

    def rebase(self) -> None:
        """Give the oldest token of the window phase S, and turn the window's keys accordingly."""
        self.num_since_rebase = 0
        base = (self.num_seen - self.shape.num_slots).clamp(min=0)
        back = (self.base - base)[:, None]
        if not isinstance(self.encoding, Alibi):
            for layer in self.layers:
                if layer.keys is not None:
                    ring = layer.keys[:, :, self.shape.num_kept :]
                    ring.copy_(self.encoding.turn(ring, back.expand(-1, ring.shape[2])))
        self.base.copy_(base)

    # -- the interface of transformers' caches ----------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Hand the new states on to `streaming_attention`, which stores them."""
        if self.step is None:
            raise ValueError(
                "this StreamingCache was made for another model: StreamingCache.for_model(model, …) makes one for this"
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Inputs taken so far, padding and sinks included, not the number of keys held.

        While a graph is traced only whether the cache is empty is known: then it is 0 or 1.
        """
        if self.num_columns is None:
            return 0
        return 1 if torch.compiler.is_compiling() else int(self.num_columns)

    def get_max_length(self, layer_idx: int = 0) -> int:
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
        return self.num_seen is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        return -1 if self.num_seen is None else self.num_seen.shape[0]

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    def reset(self) -> None:
        """Forget the streams; the next forward pass begins new ones, of any batch size."""
        self.num_seen = self.base = self.num_columns = self.step = None
        self.is_ragged = self.is_damaged = False
        self.num_since_rebase = 0
        for layer in self.layers:
            layer.free()

    def _map_rows(self, rows: Tensor) -> None:
        if self.num_seen is None:
            return
        self.num_seen = self.num_seen.index_select(0, rows.to(self.num_seen.device))
        self.base = self.base.index_select(0, rows.to(self.base.device))
        for layer in self.layers:
            layer.map_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue the stream of row ``beam_idx[i]`` (beam search)."""
        self._map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every stream ``repeats`` times."""
        if self.num_seen is not None:
            self._map_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these streams only."""
        self._map_rows(indices)
