"""One forward pass of a stream: what all its layers share, computed once, and the attention of each layer.

`DecodeStep` takes one token a row and works in place on static shapes. `ChunkStep` takes any number of tokens as a
banded attention. Both give the same numbers.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.banded_attention import attention, can_flash, flash_two_phase_attention, two_phase_attention
from ..models.sink_column import SinkColumn, merge_column
from . import kernels
from .buffers import StreamingLayer, gather_columns
from .encodings import Alibi, Encoding, Rotary
from .rule import StreamShape


class Step:
    """The pass under way: its layers' buffers, and the attention over them.

    Attributes:
        position_ids: ``(B or 1, T)`` positions of the inputs.
        num_inputs: T, with padding.
        num_new: how many of the inputs are tokens, ``(B,)`` or the same number for all rows.
    """

    position_ids: Tensor
    num_inputs: int
    num_new: Tensor | int

    def __init__(self, layers: list[StreamingLayer], shape: StreamShape, encoding: Encoding):
        self.layers, self.shape, self.encoding = layers, shape, encoding

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        column: SinkColumn | None = None,
    ) -> Tensor:
        """Store the new keys and values ``(B, G, T, D)`` of a layer, and attend: ``(B, H, T, D)``.

        Args:
            query: ``(B, H, T, D)``.
            scaling: of the scores; None is ``D ** -0.5``.
            column: of the layer's sink, if it has one.
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = self.layers[layer_idx]
        with torch.no_grad():
            layer.allocate(key, value)
            out = self._attend(layer, query, key, value, scaling, column)
        if any(states.requires_grad for states in (query, key, value)):
            return WithoutGradient.apply(out, query, key, value)
        return out

    def _attend(
        self,
        layer: StreamingLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        column: SinkColumn | None,
    ) -> Tensor:
        raise NotImplementedError


class WithoutGradient(torch.autograd.Function):
    """Says at a backward pass, and only then, that there is none: the past in the buffers has no graph."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *states: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError("a StreamingCache is for inference and gives no gradients: train without a cache")


class DecodeStep(Step):
    """One new token in every row: write it over the slot that leaves the window, then attend to all slots.

    Args:
        num_seen: ``(B,)`` tokens that each row has seen; this is the index of its new token.
        base: ``(B,)`` token index that has phase 0.
        is_token: ``(B, 1)`` False where the input is padding; it is not counted, and the next token overwrites it.
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
        self.num_seen, self.base = num_seen, base
        self.num_inputs, self.num_new = 1, 1 if is_token is None else is_token[:, 0].long()
        self.position_ids = (num_seen - base)[:, None]
        self.slot = shape.slot_of(num_seen)
        self.kept_row = num_seen.clamp(max=shape.num_kept)
        self.rows = torch.arange(num_seen.shape[0], device=num_seen.device)
        # Kept key i has phase i and must look `query position - i` away from a query at phase `token - base`.
        self.kept_turn = (num_seen - base - shape.query_position(num_seen))[:, None]
        self.phases: tuple[Tensor, Tensor] | None = None  # of that turn, for all layers
        self.visible = torch.arange(shape.num_slots, device=num_seen.device) <= num_seen[:, None]  # (B, slots)
        if isinstance(encoding, Alibi):
            tokens = shape.tokens_in_slots(num_seen + 1)
            shift = (num_seen - shape.query_position(num_seen))[:, None]
            self.key_positions = torch.where(tokens < shape.num_kept, tokens, tokens - shift)

    def _attend(self, layer, query, key, value, scaling, column):
        if kernels.is_available and isinstance(self.encoding, Rotary) and kernels.can_fuse(layer, query):
            where = (self.shape, self.encoding, layer, self.num_seen, self.base)
            out, lse = kernels.decode_attention(*where, query, key, value, scaling)
            return out if column is None else merge_column(out, lse, column)[0]
        layer.keys[self.rows, :, self.slot] = key[:, :, 0]
        layer.values[self.rows, :, self.slot] = value[:, :, 0]
        num_kept = self.shape.num_kept
        if isinstance(self.encoding, Alibi):
            mask = self.encoding.bias(self.key_positions[:, None], self.visible[:, None], like=query)
        else:
            mask = self.visible[:, None, None]
            if num_kept:
                layer.kept_keys[self.rows, :, self.kept_row] = key[:, :, 0]
                self.phases = self.phases or self.encoding.phases(self.kept_turn, like=key)
                layer.keys[:, :, :num_kept] = self.encoding.turn(layer.kept_keys[:, :, :num_kept], self.phases)
        return attention(query, layer.keys, layer.values, mask, scaling, column)


class ChunkStep(Step):
    """Several new tokens a row, all at once: a band of recent keys, and the kept keys that have left the band.

    A token of the chunk sees the window's keys before the chunk (gathered from the slots in temporal order), the
    chunk's own keys, and the kept keys. Padding is no token of the stream: nobody sees it and it is not stored.

    Args:
        num_seen, base: as in `DecodeStep`, or ``(1,)`` if they are the same for all rows.
        is_token: ``(B, T)`` which inputs are tokens and not padding; None if all are.
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
        self.num_seen = num_seen[:, None]
        self.has_equal_rows = is_token is None and num_seen.shape[0] == 1
        self.num_inputs, device = num_inputs, num_seen.device
        inputs = torch.arange(num_inputs, device=device)[None]
        if is_token is None:
            tokens = self.num_seen + inputs  # (B, T)
            self.order, self.num_new = inputs, num_inputs  # which input is a row's n-th new token
        else:
            tokens = self.num_seen + (is_token.long().cumsum(-1) - 1).clamp(min=0)
            self.order = torch.argsort(is_token.long(), dim=-1, descending=True, stable=True)
            self.num_new = is_token.sum(-1)
        self.position_ids = tokens - base[:, None]
        self.query_turn = shape.query_position(tokens) - self.position_ids  # (B, T)
        self.phases: tuple[Tensor, Tensor] | None = None  # of that turn, for all layers

        before = self.num_seen - shape.window + torch.arange(shape.window, device=device)  # (B, W), negative: none
        self.window_slots = shape.slot_of(before.clamp(min=0))
        new = tokens if is_token is None else tokens.masked_fill(~is_token, -1)
        self.is_token = is_token
        self.queries, self.band = tokens[:, :, None], torch.cat((before, new), dim=1)[:, None]  # (B, 1, W + T)
        self.kept = torch.arange(shape.num_kept, device=device)

    @cached_property
    def visible(self) -> Tensor:
        """Which kept keys and which of the band each query sees: ``(B, T, S + W + T)``."""
        window, queries, band = self.shape.window, self.queries, self.band
        in_band = (band >= 0) & (band <= queries) & (band >= queries - window)
        if self.is_token is not None:  # a padding query sees itself, so that its softmax is over something
            itself = torch.eye(self.num_inputs, dtype=torch.bool, device=band.device)
            in_band[:, :, window:] |= itself & ~self.is_token[:, None]
        return torch.cat((self.kept < queries - window, in_band), dim=-1)

    @cached_property
    def key_positions(self) -> Tensor:
        """Positions within the cache of the same keys, as each query sees them."""
        in_band = self.band - self.queries + self.shape.query_position(self.queries)
        return torch.cat((self.kept.expand(*in_band.shape[:2], -1), in_band), dim=-1)

    @cached_property
    def num_empty(self) -> int:
        """Places before the chunk that no token has taken yet, in rows of equal length."""
        return max(self.shape.window - int(self.num_seen[0]), 0)

    @cached_property
    def replacements(self) -> tuple[Tensor, Tensor]:
        """Which slots ``(B, 1, slots, 1)`` the chunk writes, and the input ``(B, slots)`` that comes into each."""
        tokens = self.shape.tokens_in_slots(self.num_seen[:, 0] + self.num_new)
        ranks = (tokens - self.num_seen).clamp(0, self.num_inputs - 1)
        return (tokens >= self.num_seen)[:, None, :, None], self.order.expand(len(ranks), -1).gather(1, ranks)

    def _attend(self, layer, query, key, value, scaling, column):
        num_kept = self.shape.num_kept
        window_key = gather_columns(layer.keys, self.window_slots)
        window_value = gather_columns(layer.values, self.window_slots)
        self._store(layer, key, value)
        band_key, band_value = torch.cat((window_key, key), dim=2), torch.cat((window_value, value), dim=2)
        kept_value = layer.values[:, :, :num_kept]
        if isinstance(self.encoding, Alibi):
            bias = self.encoding.bias(self.key_positions, self.visible, like=query)
            keys = torch.cat((layer.keys[:, :, :num_kept], band_key), dim=2)
            return attention(query, keys, torch.cat((kept_value, band_value), dim=2), bias, scaling, column)
        kept_key = layer.kept_keys[:, :, :num_kept]
        turned = query
        if num_kept:
            self.phases = self.phases or self.encoding.phases(self.query_turn, like=query)
            turned = self.encoding.turn(query, self.phases)
        if self.has_equal_rows and can_flash(query):
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
                scaling,
                column,
            )
        values, mask = torch.cat((kept_value, band_value), dim=2), self.visible[:, None]
        return two_phase_attention(
            query, turned, kept_key, band_key, values, mask, scaling, self.encoding.num_dims, column
        )

    def _store(self, layer: StreamingLayer, key: Tensor, value: Tensor) -> None:
        """Write what the slots hold after the chunk: each slot's newest token if the chunk brings it."""
        is_new, columns = self.replacements
        num_kept = self.shape.num_kept
        layer.keys.copy_(torch.where(is_new, gather_columns(key, columns), layer.keys))
        layer.values.copy_(torch.where(is_new, gather_columns(value, columns), layer.values))
        kept = layer.kept_keys[:, :, :num_kept]
        kept.copy_(torch.where(is_new[:, :, :num_kept], layer.keys[:, :, :num_kept], kept))
