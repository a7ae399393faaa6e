"""The blocks of a memory in host memory, with their index."""

from collections.abc import Iterator

import torch
from torch import Tensor

NUM_INDEX_BYTES = 2**26  # of the index, that are on the device at a time


class HostBlocks:
    """Keys and values of blocks, and representative keys of each.

    The buffers grow by doubling, and are page-locked if the states are on a GPU. Copies share them
    until they add blocks of their own.

    Attributes:
        keys, values: ``(N, B, G, block_size, D)``; the first ``len(blocks)`` are used.
        index: ``(N, B, G, num_representatives, D)``, means of consecutive keys.
    """

    BUFFERS = ("keys", "values", "index")

    keys: Tensor
    values: Tensor
    index: Tensor

    def __init__(self, num_representatives: int):
        self.num_representatives = num_representatives
        self.num_blocks = 0
        self.is_pinned = False
        self.is_shared = False  # others may have the same buffers, and may have added blocks to them

    def __len__(self) -> int:
        return self.num_blocks

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append blocks ``(B, G, N, block_size, D)``."""
        index = keys.unflatten(3, (self.num_representatives, -1)).mean(4)
        new = [states.movedim(2, 0) for states in (keys, values, index)]
        self.is_pinned |= keys.is_cuda
        end = self.num_blocks + len(new[0])
        for name, states in zip(self.BUFFERS, new, strict=True):
            buffer = getattr(self, name, None)
            if buffer is None or len(buffer) < end or self.is_shared:
                buffer = self.grown(buffer, states, end)
                setattr(self, name, buffer)
            buffer[self.num_blocks : end] = states
        self.num_blocks, self.is_shared = end, False

    def shared(self) -> "HostBlocks":
        """Return a copy with the same buffers. The original may add blocks to them."""
        twin = HostBlocks(self.num_representatives)
        vars(twin).update(vars(self))
        twin.is_shared = True
        return twin

    def grown(self, buffer: Tensor | None, states: Tensor, num_needed: int) -> Tensor:
        """Return a larger copy of a buffer for states like these.

        It can also be used outside of `torch.inference_mode`.
        """
        size = max(num_needed, 2 * (0 if buffer is None else len(buffer)), 16)
        with torch.inference_mode(False):
            larger = torch.empty((size, *states.shape[1:]), dtype=states.dtype, pin_memory=self.is_pinned)
        if buffer is not None:
            larger[: self.num_blocks] = buffer[: self.num_blocks]
        return larger

    def gather(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, G, N, K * block_size, D)`` of blocks ``(B, G, N, K)``."""
        chosen = chosen.cpu()
        rows, heads = torch.arange(chosen.shape[0])[:, None, None, None], torch.arange(chosen.shape[1])[:, None, None]
        keys, values = (states[chosen, rows, heads].flatten(3, 4) for states in (self.keys, self.values))
        return keys, values

    def index_parts(self, num_blocks: int) -> Iterator[Tensor]:
        """Yield the index of the first blocks in parts ``(B, G, blocks, representatives, D)``."""
        index = self.index[:num_blocks]
        size = max(1, NUM_INDEX_BYTES // index[0].nbytes)
        yield from (part.movedim(0, 2) for part in index.split(size))

    def truncate(self, num_blocks: int) -> None:
        """Remove all but the first blocks."""
        if num_blocks < self.num_blocks:
            self.num_blocks, self.is_shared = num_blocks, True  # a copy may still have the removed ones

    @property
    def num_bytes(self) -> int:
        """Allocated bytes, of which those of a shared buffer count for each copy."""
        return sum(getattr(self, name).nbytes for name in self.BUFFERS if hasattr(self, name))

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {name: getattr(self, name)[: self.num_blocks] for name in self.BUFFERS} if self.num_blocks else {}

    def set_buffers(self, buffers: dict[str, Tensor], *, is_pinned: bool) -> None:
        """Replace the blocks by copies."""
        for name in self.BUFFERS:
            vars(self).pop(name, None)
        self.num_blocks, self.is_pinned, self.is_shared = len(buffers["keys"]) if buffers else 0, is_pinned, False
        for name, states in buffers.items():
            setattr(self, name, self.grown(None, states, len(states)))
            getattr(self, name)[: len(states)] = states

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``."""
        selected = {name: states.index_select(1, rows.cpu()) for name, states in self.buffers.items()}
        self.set_buffers(selected, is_pinned=self.is_pinned)
