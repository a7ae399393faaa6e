"""A digest of the text that the streams of a cache have read, to recognize another text.

The digest of a row is a sum over its tokens, so tokens can be added in any number of passes,
removed again, and compared without being stored. All arithmetic is on the device, below 2^63.
"""

import torch
from torch import Tensor

from .buffers import select_rows, static_copy, static_zeros

PRIME = 2**31 - 1
# Two independent digests of 31 bits: factors of the column and of the token id, and a constant.
FACTORS = ((1_103_515_245, 22_695_477, 747_796_405), (1_664_525, 1_140_671_485, 214_013))


class TextRecord:
    """What each row of a batch has read, by column. Columns with padding do not count.

    Attributes:
        digest: ``(B, 2)``, sums modulo `PRIME`.
        first_ids: ``(B, N + 1)``, the ids of the first N columns, which `remove` needs. The last
            entry is scratch space.
        is_known: False if embeddings were read, whose ids are unknown.
    """

    def __init__(self, digest: Tensor, first_ids: Tensor, is_known: bool = True):
        self.digest, self.first_ids, self.is_known = digest, first_ids, is_known

    @classmethod
    def start(cls, batch_size: int, num_ids: int, device: torch.device) -> "TextRecord":
        shapes = ((batch_size, 2), (batch_size, num_ids + 1))
        return cls(*(static_zeros(shape, torch.long, device) for shape in shapes))

    def copy(self) -> "TextRecord":
        return TextRecord(static_copy(self.digest), static_copy(self.first_ids), self.is_known)

    def __deepcopy__(self, memo: dict) -> "TextRecord":
        return self.copy()

    def to(self, device: torch.device) -> "TextRecord":
        return TextRecord(self.digest.to(device), self.first_ids.to(device), self.is_known).copy()

    def add(self, inputs: Tensor, is_token: Tensor | None, num_columns: Tensor) -> None:
        """Add ids ``(B, T)``, or embeddings ``(B, T, D)``, after ``num_columns`` ``()`` columns."""
        if inputs.is_floating_point():
            self.is_known = False
            return
        columns = num_columns + torch.arange(inputs.shape[1], device=inputs.device)
        self.digest.add_(digest_of(inputs, is_token, columns)).remainder_(PRIME)
        self.first_ids[:, columns.clamp(max=self.first_ids.shape[1] - 1)] = inputs.long()

    def remove(self, num_removed: int, num_columns: Tensor) -> None:
        """Remove the last of ``num_columns`` columns; there are at most N, without padding."""
        columns = num_columns - num_removed + torch.arange(num_removed, device=num_columns.device)
        self.digest.sub_(digest_of(self.first_ids[:, columns], None, columns)).remainder_(PRIME)

    def map_rows(self, rows: Tensor) -> None:
        self.digest, self.first_ids = select_rows(self.digest, rows), select_rows(self.first_ids, rows)

    def restart_rows(self, rows: Tensor, sink_ids: list[int]) -> None:
        """Let rows start again after the sinks: the rest that they have read counts as padding."""
        sinks = torch.tensor(sink_ids, dtype=torch.long, device=self.digest.device)
        self.digest[rows] = digest_of(sinks[None], None, torch.arange(len(sink_ids), device=self.digest.device))

    def has_read(self, ids: Tensor, is_token: Tensor | None) -> Tensor:
        """Return for each row ``(B,)`` whether exactly these ids ``(B, T)`` were read."""
        columns = torch.arange(ids.shape[1], device=self.digest.device)
        is_token = None if is_token is None else is_token.to(self.digest.device)
        return (digest_of(ids.to(self.digest.device), is_token, columns) == self.digest).all(-1)


def digest_of(ids: Tensor, is_token: Tensor | None, columns: Tensor) -> Tensor:
    """Return the digest ``(B, 2)`` of ids ``(B, T)`` in ``columns`` ``(T,)``."""
    parts = []
    for of_column, of_id, constant in FACTORS:
        mixed = (columns % PRIME * of_column + ids.long() * of_id + constant) % PRIME
        mixed = mixed * mixed % PRIME * mixed % PRIME
        parts.append((mixed if is_token is None else mixed * is_token).sum(-1) % PRIME)
    return torch.stack(parts, dim=-1)
