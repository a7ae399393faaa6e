"""The counters of the streams of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import select_rows, static_copy, static_zeros


@dataclass
class StreamCounters:
    """Counters of the streams of a batch, on the device so that a compiled step can update them.

    Attributes:
        num_seen: ``(B,)``, tokens seen in each row.
        base: ``(B,)``, index of the token that has phase 0.
        num_columns: ``()``, inputs seen including padding, the sequence length for transformers.
    """

    num_seen: Tensor
    base: Tensor
    num_columns: Tensor

    @classmethod
    def start(cls, batch_size: int, device: torch.device) -> "StreamCounters":
        return cls(*(static_zeros(shape, torch.long, device) for shape in ((batch_size,), (batch_size,), ())))

    def copy(self) -> "StreamCounters":
        return StreamCounters(*(static_copy(tensor) for tensor in (self.num_seen, self.base, self.num_columns)))

    def __deepcopy__(self, memo: dict) -> "StreamCounters":
        return self.copy()

    def to(self, device: torch.device) -> "StreamCounters":
        return StreamCounters(*(tensor.to(device) for tensor in (self.num_seen, self.base, self.num_columns))).copy()

    def map_rows(self, rows: Tensor) -> None:
        self.num_seen, self.base = select_rows(self.num_seen, rows), select_rows(self.base, rows)
