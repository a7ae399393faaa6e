"""The buffers of one attention layer: keys and values in slots, and the kept keys as they were written."""

import torch
from torch import Tensor

from .rule import StreamShape


class StreamingLayer:
    """Static buffers of one layer, allocated by its first keys and written in place.

    ``keys``, ``values``: ``(B, G, S + W + 1, D)``, slots as in `StreamShape`. ``kept_keys``: ``(B, G, S + 1, D)``,
    the kept keys at phases 0 … S - 1, from which the first S slots are turned for every step (the last row is where a
    token that is not kept is thrown). ``num_arrived``: ``(B, G)``, a counter of the decoding kernel, 0 at rest.
    """

    keys: Tensor
    values: Tensor
    kept_keys: Tensor
    num_arrived: Tensor

    def __init__(self, shape: StreamShape):
        self.shape = shape
        self.is_allocated = False

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Make the buffers for states like these ``(B, G, T, D)``, unless they are there."""
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
        twin = StreamingLayer(self.shape)
        twin.is_allocated = self.is_allocated
        if self.is_allocated:
            twin.keys, twin.values = static_copy(self.keys), static_copy(self.values)
            twin.kept_keys, twin.num_arrived = static_copy(self.kept_keys), static_copy(self.num_arrived)
        return twin

    def map_rows(self, rows: Tensor) -> None:
        """Put row ``rows[i]`` of the batch in place i; the batch may grow or shrink."""
        if self.is_allocated:
            self.keys = select_rows(self.keys, rows)
            self.values = select_rows(self.values, rows)
            self.kept_keys = select_rows(self.kept_keys, rows)
            self.num_arrived = select_rows(self.num_arrived, rows)


def zeros_like_heads(states: Tensor, length: int) -> Tensor:
    """A buffer ``(B, G, length, D)`` for states ``(B, G, T, D)``."""
    return static_zeros((*states.shape[:2], length, states.shape[3]), states.dtype, states.device)


@torch.compiler.disable
def static_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that stays where it is, as a CUDA graph needs; usable outside of `torch.inference_mode` too."""
    with torch.inference_mode(False):
        buffer = torch.zeros(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def static_copy(states: Tensor) -> Tensor:
    """A buffer as `static_zeros` makes them, with these contents."""
    with torch.no_grad():
        return static_zeros(tuple(states.shape), states.dtype, states.device).copy_(states)


def select_rows(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows of a buffer ``(B, …)``; in place if their number stays, since a captured graph may read it there."""
    selected = buffer.index_select(0, rows.to(buffer.device))
    return buffer.copy_(selected) if selected.shape == buffer.shape else static_copy(selected)


def gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Pick columns ``(B or 1, N)`` of keys or values ``(B, G, T, D)``: ``(B, G, N, D)``."""
    index = columns[:, None, :, None].expand(states.shape[0], states.shape[1], -1, states.shape[3])
    return torch.gather(states, 2, index)
