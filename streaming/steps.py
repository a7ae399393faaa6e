"""One forward pass of a stream: the values that layers share, and the attention of each layer.

`DecodeStep` handles one token per row, in place and with static shapes. `ChunkStep` handles any
number of tokens as banded attention. Both compute the same result. A `Pass` has one of them for
each group of layers with the same shape and position encoding.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.banded_attention import attention, flash_two_phase_attention, two_phase_attention
from ..models.fused_attention import can_flash
from ..models.sink_column import SinkColumn, merge_column
from . import kernels
from .buffers import StreamingLayer, gather_columns
from .encodings import Alibi, Encoding, Rotary
from .quantized import RecentTokens
from .rule import StreamShape


class Softmax(NamedTuple):
    """How the scores of a layer become weights, see `Step.attend`."""

    scaling: float
    column: SinkColumn | None = None
    softcap: float | None = None


class Step:
    """A forward pass over new inputs for layers of one shape and one position encoding.

    Attributes:
        position_ids: ``(B or 1, T)`` positions of the inputs.
        num_inputs: T, including padding.
        num_new: number of tokens among the inputs, ``(B,)`` or one number for all rows.
        num_seen: tokens before the pass, ``(B or 1,)`` or ``(B or 1, 1)``.
        memory_phases: of the queries for the memory, shared by all layers.
    """

    position_ids: Tensor
    num_inputs: int
    num_new: Tensor | int
    num_seen: Tensor

    def __init__(self, layers: list[StreamingLayer], shape: StreamShape, encoding: Encoding):
        self.layers, self.shape, self.encoding = layers, shape, encoding
        self.arguments: tuple = ()  # of the pass
        self.copies: dict[torch.device, Step] = {}
        self._recent: RecentTokens | None = None
        self.memory_phases: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> "Step":
        """Return this pass with its tensors on another device, for the layers there."""
        if device == self.position_ids.device:
            return self
        if device not in self.copies:
            moved = (value.to(device) if isinstance(value, Tensor) else value for value in self.arguments)
            self.copies[device] = type(self)(self.layers, self.shape, self.encoding, *moved)
        return self.copies[device]

    @property
    def recent(self) -> RecentTokens:
        """Where quantized layers find the tokens before the pass that they store as they are."""
        if self._recent is None:  # `cached_property` has a lock in Python 3.11, so it cannot be compiled
            self._recent = RecentTokens(self.shape, self.num_seen.flatten())
        return self._recent

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        column: SinkColumn | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Store the new keys and values ``(B, G, T, D)`` of a layer and compute its attention.

        Args:
            query: ``(B, H, T, D)``.
            scaling: factor of the scores; None is ``D ** -0.5``.
            column: the column of the layer's sink, if it has one.
            softcap: limit of the scores, ``softcap * tanh(score / softcap)``; None for no limit.

        Returns:
            ``(B, H, T, D)``.
        """
        softmax = Softmax(query.shape[-1] ** -0.5 if scaling is None else scaling, column, softcap)
        if not query.shape[2] == key.shape[2] == self.num_inputs:
            raise ValueError(
                f"layer {layer_idx} has {query.shape[2]} queries and {key.shape[2]} keys of {self.num_inputs} inputs, "
                "but a StreamingCache requires one of each"
            )
        layer = self.layers[layer_idx]
        with torch.no_grad():
            layer.allocate(key, value)
            if layer.memory is not None:
                layer.memory.allocate(query, key, value)
            out = self.on(key.device)._attend(layer, query, key, value, softmax)
        if any(states.requires_grad for states in (query, key, value)):
            return WithoutGradient.apply(out, query, key, value)
        return out

    def _attend(
        self,
        layer: StreamingLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        raise NotImplementedError


class Pass:
    """One forward pass: a step for each group of layers. All steps have the same inputs.

    Attributes:
        position_ids, num_inputs, num_new: as in `Step`.
        is_waiting: whether the cache got keys of a layer whose attention is not computed yet. The
            number of the layer would make torch compile the code of each layer anew.
    """

    def __init__(self, steps: list[Step], group_of_layer: Sequence[int]):
        self.is_waiting = False
        self.steps, self.group_of_layer = steps, group_of_layer
        self.position_ids, self.num_inputs, self.num_new = steps[0].position_ids, steps[0].num_inputs, steps[0].num_new

    def of(self, layer_idx: int) -> Step:
        """Return the step of a layer."""
        return self.steps[self.group_of_layer[layer_idx]]

    def attend(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """See `Step.attend`."""
        self.is_waiting = False
        return self.of(layer_idx).attend(layer_idx, *args, **kwargs)

    def check_attended(self) -> None:
        """Raise a ValueError if a layer has not used the attention of the cache."""
        if self.is_waiting:
            raise ValueError(
                "a layer of the model does not use the attention of its StreamingCache, since its code or its config "
                "was replaced: create the cache after the change, or use the attention of transformers"
            )


class WithoutGradient(torch.autograd.Function):
    """Raises an error in the backward pass: the tokens in the buffers have no autograd graph."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *states: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError("a StreamingCache has no gradients, it is for inference only: train without a cache")


class DecodeStep(Step):
    """One new token per row: write it to the slot that leaves the window, then attend to all slots.

    Args:
        num_seen: ``(B,)``, tokens that each row has seen, which is the index of its new token.
        base: ``(B,)``, index of the token that has phase 0.
        is_token: ``(B, 1)``, False for padding. Padding is not counted, and the next token
            overwrites it.
    """

    def __init__(
        self,
        layers: list[StreamingLayer],
        shape: StreamShape,
        encoding: Encoding,
        num_seen: Tensor,
        base: Tensor,
        is_token: Tensor | None = None,
    ):
        super().__init__(layers, shape, encoding)
        self.arguments = (num_seen, base, is_token)
        self.num_seen, self.base = num_seen, base
        self.num_inputs, self.num_new = 1, 1 if is_token is None else is_token[:, 0].long()
        self.position_ids = (num_seen - base)[:, None]
        self.slot = shape.slot_of(num_seen)
        self.kept_row = num_seen.clamp(max=shape.num_kept)
        self.rows = torch.arange(num_seen.shape[0], device=num_seen.device)
        # Kept key i has phase i. The query has phase `token - base`, but its distance to the key
        # must be `query position - i`.
        self.kept_turn = (num_seen - base - shape.query_position(num_seen))[:, None]
        self.phases: tuple[Tensor, Tensor] | None = None  # of `kept_turn`, shared by all layers
        self.visible = torch.arange(shape.num_slots, device=num_seen.device) <= num_seen[:, None]  # (B, slots)
        if isinstance(encoding, Alibi):
            tokens = shape.tokens_in_slots(num_seen + 1)
            shift = (num_seen - shape.query_position(num_seen))[:, None]
            self.key_positions = torch.where(tokens < shape.num_kept, tokens, tokens - shift)

    def _attend(self, layer, query, key, value, softmax):
        encoding, has_kernel = self.encoding, kernels.is_available and softmax.softcap is None
        if layer.memory is not None:
            layer.memory.choose_in(self, layer, query, softmax.scaling)
        if has_kernel and isinstance(encoding, Rotary) and kernels.can_fuse(encoding, layer, query):
            where = (self.shape, encoding, layer, self.num_seen, self.base)
            out, lse = kernels.decode_attention(*where, query, key, value, softmax.scaling)
            return out if softmax.column is None else merge_column(out, lse, softmax.column)[0]
        if layer.memory is not None:
            softmax = layer.memory.add_to_token(softmax, self, layer, query)
        layer.write(key, value, self)
        keys, values = layer.read(self)
        num_kept = self.shape.num_kept
        if isinstance(self.encoding, Alibi):
            mask = self.encoding.bias(self.key_positions[:, None], self.visible[:, None], like=query)
        else:
            mask = self.visible[:, None, None]
            if num_kept and layer.has_positions:
                self.phases = self.phases or self.encoding.phases(self.kept_turn, like=key)
                keys[:, :, :num_kept] = self.encoding.turn(layer.kept_keys[:, :, :num_kept], self.phases)
        return attention(query, keys, values, mask, *softmax)


class ChunkStep(Step):
    """Several new tokens per row: attention to a band of recent keys and to kept keys before it.

    A token of the chunk sees the window's keys before the chunk (gathered from the slots in
    temporal order), the chunk's own keys, and the kept keys. Padding is never seen or stored.

    Args:
        num_seen, base: as in `DecodeStep`, or ``(1,)`` if they are the same for all rows.
        is_token: ``(B, T)``, False for padding; None if there is no padding.
    """

    def __init__(
        self,
        layers: list[StreamingLayer],
        shape: StreamShape,
        encoding: Encoding,
        num_seen: Tensor,
        base: Tensor,
        num_inputs: int,
        is_token: Tensor | None = None,
    ):
        super().__init__(layers, shape, encoding)
        self.arguments = (num_seen, base, num_inputs, is_token)
        self.num_seen, self.base = num_seen[:, None], base
        self.has_equal_rows = is_token is None and num_seen.shape[0] == 1
        self.num_inputs, device = num_inputs, num_seen.device
        inputs = torch.arange(num_inputs, device=device)[None]
        if is_token is None:
            tokens = self.num_seen + inputs  # (B, T)
            self.order, self.num_new = inputs, num_inputs  # `order[n]` is the input with a row's n-th new token
        else:
            tokens = self.num_seen + (is_token.long().cumsum(-1) - 1).clamp(min=0)
            self.order = torch.argsort(is_token.long(), dim=-1, descending=True, stable=True)
            self.num_new = is_token.sum(-1)
        self.position_ids = tokens - base[:, None]
        self.query_turn = shape.query_position(tokens) - self.position_ids  # (B, T)
        self.phases: tuple[Tensor, Tensor] | None = None  # of `query_turn`, shared by all layers

        before = self.num_seen - shape.window + torch.arange(shape.window, device=device)  # (B, W), negative if empty
        self.window_slots = shape.slot_of(before.clamp(min=0))
        new = tokens if is_token is None else tokens.masked_fill(~is_token, -1)
        self.is_token = is_token
        self.queries, self.band = tokens[:, :, None], torch.cat((before, new), dim=1)[:, None]  # (B, 1, W + T)
        self.kept = torch.arange(shape.num_kept, device=device)

    @cached_property
    def visible(self) -> Tensor:
        """Which kept keys and band keys each query sees, ``(B, T, S + W + T)``."""
        window, queries, band = self.shape.window, self.queries, self.band
        in_band = (band >= 0) & (band <= queries) & (band >= queries - window)
        if self.is_token is not None:  # a padding query sees itself, so that its softmax is not empty
            itself = torch.eye(self.num_inputs, dtype=torch.bool, device=band.device)
            in_band[:, :, window:] |= itself & ~self.is_token[:, None]
        return torch.cat((self.kept < queries - window, in_band), dim=-1)

    @cached_property
    def key_positions(self) -> Tensor:
        """Positions within the cache of the same keys, relative to each query."""
        in_band = self.band - self.queries + self.shape.query_position(self.queries)
        return torch.cat((self.kept.expand(*in_band.shape[:2], -1), in_band), dim=-1)

    @cached_property
    def first(self) -> int:
        """Index of the first token, for rows of equal length."""
        return int(self.num_seen[0])

    @property
    def num_empty(self) -> int:
        """Number of empty slots in the window before the chunk, for rows of equal length."""
        return max(self.shape.window - self.first, 0)

    @cached_property
    def replacements(self) -> tuple[Tensor, Tensor]:
        """Which slots ``(B, 1, slots, 1)`` are overwritten, and by which input ``(B, slots)``."""
        return self.replaced(self.shape.tokens_in_slots(self.num_seen[:, 0] + self.num_new))

    @cached_property
    def recent_replacements(self) -> tuple[Tensor, Tensor]:
        """The same for the rows that a quantized layer stores in full precision."""
        return self.replaced(self.recent.after(self.num_seen[:, 0] + self.num_new))

    def replaced(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return `replacements` of slots that hold ``tokens`` ``(B or 1, N)`` after the chunk."""
        ranks = (tokens - self.num_seen).clamp(0, self.num_inputs - 1)
        return (tokens >= self.num_seen)[:, None, :, None], self.order.expand(len(ranks), -1).gather(1, ranks)

    def _attend(self, layer, query, key, value, softmax):
        if layer.memory is not None:
            softmax = layer.memory.add_to_chunk(softmax, self, layer, (query, key, value))
        num_kept = self.shape.num_kept
        keys, values = layer.read(self)
        window_key, window_value = gather_columns(keys, self.window_slots), gather_columns(values, self.window_slots)
        layer.store(key, value, self)
        band_key, band_value = torch.cat((window_key, key), dim=2), torch.cat((window_value, value), dim=2)
        kept_key, kept_value = layer.kept_keys[:, :, :num_kept], layer.first_values
        if isinstance(self.encoding, Alibi):
            bias = self.encoding.bias(self.key_positions, self.visible, like=query)
            keys = torch.cat((kept_key, band_key), dim=2)
            return attention(query, keys, torch.cat((kept_value, band_value), dim=2), bias, *softmax)
        turned = query
        if num_kept and layer.has_positions:
            self.phases = self.phases or self.encoding.phases(self.query_turn, like=query)
            turned = self.encoding.turn(query, self.phases)
        is_flash = can_flash(query) and value.shape[-1] <= query.shape[-1] and softmax.softcap is None
        if self.has_equal_rows and is_flash:
            empty = self.num_empty
            return flash_two_phase_attention(
                query,
                turned,
                kept_key,
                kept_value,
                self.kept < self.queries[0] - self.shape.window,
                band_key[:, :, empty:],
                band_value[:, :, empty:],
                self.shape.window,
                softmax.scaling,
                softmax.column,
            )
        values, mask = torch.cat((kept_value, band_value), dim=2), self.visible[:, None]
        scaling, *limits = softmax
        return two_phase_attention(
            query, turned, kept_key, band_key, values, mask, scaling, self.encoding.dims, *limits
        )
