"""Buffers of an attention layer: keys and values in slots, and the original kept keys."""

import torch
from torch import Tensor

from .rule import StreamShape


class StreamingLayer:
    """Static buffers of one layer, allocated with the first keys and written in place.

    Attributes:
        has_positions: False if the layer's keys are not rotated.
        keys, values: ``(B, G, S + W + 1, D)``, slots as in `StreamShape`.
        kept_keys: ``(B, G, S + 1, D)``, the kept keys at phases 0 … S - 1, from which the first S
            slots of ``keys`` are rotated for every step. The last row is scratch space: tokens that
            are not kept are written to it.
        num_arrived: ``(B, G)``, counter of the decoding kernel, 0 between steps.
    """

    keys: Tensor
    values: Tensor
    kept_keys: Tensor
    num_arrived: Tensor

    def __init__(self, shape: StreamShape, has_positions: bool = True):
        self.shape, self.has_positions = shape, has_positions
        self.is_allocated = False

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate the buffers for states like these ``(B, G, T, D)`` if they do not exist yet."""
        if self.is_allocated:
            return
        self.keys = zeros_like_heads(key, self.shape.num_slots)
        self.values = zeros_like_heads(value, self.shape.num_slots)
        self.kept_keys = zeros_like_heads(key, self.shape.num_kept + 1)
        self.num_arrived = static_zeros(key.shape[:2], torch.int32, key.device)
        self.is_allocated = True

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.kept_keys.nbytes if self.is_allocated else 0

    def free(self) -> None:
        if self.is_allocated:
            del self.keys, self.values, self.kept_keys, self.num_arrived
            self.is_allocated = False

    def __deepcopy__(self, memo: dict) -> "StreamingLayer":
        twin = StreamingLayer(self.shape, self.has_positions)
        twin.is_allocated = self.is_allocated
        if self.is_allocated:
            twin.keys, twin.values = static_copy(self.keys), static_copy(self.values)
            twin.kept_keys, twin.num_arrived = static_copy(self.kept_keys), static_copy(self.num_arrived)
        return twin

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``; the batch size may change."""
        if self.is_allocated:
            self.keys = select_rows(self.keys, rows)
            self.values = select_rows(self.values, rows)
            self.kept_keys = select_rows(self.kept_keys, rows)
            self.num_arrived = select_rows(self.num_arrived, rows)


def zeros_like_heads(states: Tensor, length: int) -> Tensor:
    """Return a zero buffer ``(B, G, length, D)`` for states ``(B, G, T, D)``."""
    return static_zeros((*states.shape[:2], length, states.shape[3]), states.dtype, states.device)


@torch.compiler.disable
def static_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a zero buffer with a static address, as CUDA graphs require.

    The buffer can also be used outside of `torch.inference_mode`.
    """
    with torch.inference_mode(False):
        buffer = torch.zeros(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def static_copy(states: Tensor) -> Tensor:
    """Copy a tensor to a new buffer made by `static_zeros`."""
    with torch.no_grad():
        return static_zeros(tuple(states.shape), states.dtype, states.device).copy_(states)


def select_rows(buffer: Tensor, rows: Tensor) -> Tensor:
    """Select rows of a buffer ``(B, …)``.

    If their number does not change, this is done in place: a captured graph may read the buffer.
    """
    selected = buffer.index_select(0, rows.to(buffer.device))
    return buffer.copy_(selected) if selected.shape == buffer.shape else static_copy(selected)


def gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Gather ``columns`` ``(B or 1, N)`` of keys or values ``(B, G, T, D)`` to ``(B, G, N, D)``."""
    index = columns[:, None, :, None].expand(states.shape[0], states.shape[1], -1, states.shape[3])
    return torch.gather(states, 2, index)
