"""The buffers of one attention layer: keys and values in slots, and the kept keys as they were written."""

import torch
from torch import Tensor

from .contract import StreamShape


class StreamingLayer:
    """Static buffers of one layer, allocated by its first keys and written in place.

    ``keys``, ``values``: ``(B, G, S + W + 1, D)``, slots as in `StreamShape`. ``kept_keys``: ``(B, G, S + 1, D)``,
    the kept keys at phases 0 … S - 1, from which the first S slots are turned for every step (the last row is where a
    token that is not kept is thrown).
    """

    def __init__(self, shape: StreamShape):
        self.shape = shape
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.kept_keys: Tensor | None = None

    def buffers(self) -> dict[str, Tensor]:
        """The allocated buffers by name."""
        return {
            name: getattr(self, name) for name in ("keys", "values", "kept_keys") if getattr(self, name) is not None
        }

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Make the buffers for keys and values like these ``(B, G, T, D)``, unless they are there."""
        if self.keys is not None:
            return
        batch_size, num_groups, _, head_dim = key.shape
        num_slots, num_kept = self.shape.num_slots, self.shape.num_kept
        self.keys = key.new_zeros(batch_size, num_groups, num_slots, head_dim)
        self.values = value.new_zeros(batch_size, num_groups, num_slots, value.shape[-1])
        self.kept_keys = key.new_zeros(batch_size, num_groups, num_kept + 1, head_dim)

    def free(self) -> None:
        self.keys = self.values = self.kept_keys = None

    def map_rows(self, rows: Tensor) -> None:
        """Put row ``rows[i]`` of the batch in place i; the batch may grow or shrink."""
        for name, buffer in self.buffers().items():
            selected = buffer.index_select(0, rows.to(buffer.device))
            if selected.shape == buffer.shape:
                buffer.copy_(selected)  # keep the address: a captured graph may read it
            else:
                setattr(self, name, selected)


def gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Pick columns ``(B or 1, N)`` of keys or values ``(B, G, T, D)``: ``(B, G, N, D)``."""
    index = columns[:, None, :, None].expand(states.shape[0], states.shape[1], -1, states.shape[3])
    return torch.gather(states, 2, index)
