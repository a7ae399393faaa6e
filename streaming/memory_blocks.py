"""The blocks of a memory in host memory, with their index."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_INDEX_BYTES = 2**26  # of the index, that are on the device at a time


class PageLocked:
    """Page-locked host memory as an array that a CUDA device reads over the bus.

    ``torch.as_tensor`` makes a tensor of it without a copy. When the last such tensor is gone, the
    memory is released after the device has finished its work.
    """

    def __init__(self, states: Tensor, device: torch.device):
        self.states, self.device = states, device
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (states.nbytes,),
            "typestr": "|u1",
            "data": (states.data_ptr(), False),
            "version": 2,
        }

    def __del__(self) -> None:
        if not sys.is_finalizing() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)


def readable_from(device: torch.device, states: Tensor) -> Tensor:
    """Return a tensor on a CUDA device that reads page-locked states.

    If the memory was allocated for another device, return the states themselves.
    """
    with torch.inference_mode(False), torch.cuda.device(device):
        seen = torch.as_tensor(PageLocked(states, device), device=device)
        is_copy = seen.data_ptr() != states.data_ptr()
        return states if is_copy else seen.view(states.dtype).view(states.shape)


class HostBlocks:
    """Keys and values of blocks, and representative keys of each.

    The buffers grow by doubling. If the states are on a GPU, they are page-locked, and the GPU
    reads them without a copy on the host. Copies of this object share them until they add blocks of
    their own.

    Attributes:
        keys, values: ``(N, B, G, block_size, D)``; the first ``len(blocks)`` are used.
        index: ``(N, B, G, num_representatives, D)``, means of consecutive keys.
    """

    BUFFERS = ("keys", "values", "index")

    keys: Tensor
    values: Tensor
    index: Tensor

    def __init__(self, representative_size: int):
        self.representative_size = representative_size
        self.num_blocks = 0
        self.is_pinned = False
        self.is_shared = False  # others may have the same buffers, and may have added blocks to them
        self.seen: dict[tuple[str, torch.device], Tensor] = {}  # the buffers, as devices see them

    def __len__(self) -> int:
        return self.num_blocks

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append blocks ``(B, G, N, block_size, D)``."""
        append_to([self], keys, values)

    def write_after(self, name: str, states: Tensor) -> None:
        """Write ``(N, B, G, …, D)`` after the used part of a buffer, which grows if it must."""
        self.is_pinned |= states.is_cuda
        end, buffer = self.num_blocks + len(states), getattr(self, name, None)
        if buffer is None or len(buffer) < end or self.is_shared or (states.is_cuda and not buffer.is_pinned()):
            buffer = self.grown(buffer, states, end)
            self.set_buffer(name, buffer)
        buffer[self.num_blocks : end].copy_(states, non_blocking=states.is_cuda)

    def shared(self) -> "HostBlocks":
        """Return a copy with the same buffers. The original may add blocks to them."""
        twin = HostBlocks(self.representative_size)
        vars(twin).update(vars(self), seen=dict(self.seen))
        twin.is_shared = True
        return twin

    def grown(self, buffer: Tensor | None, states: Tensor, num_needed: int) -> Tensor:
        """Return a copy of a buffer for states like these, which is larger if it must be.

        It can also be used outside of `torch.inference_mode`.
        """
        size = 0 if buffer is None else len(buffer)
        size = max(num_needed, size if num_needed <= size else 2 * size, 16)
        with torch.inference_mode(False):
            shape = size, *states.shape[1:]
            grown = torch.empty(shape, dtype=states.dtype, pin_memory=self.is_pinned, device="cpu")
        if buffer is not None:
            grown[: self.num_blocks] = buffer[: self.num_blocks]
        return grown

    def set_buffer(self, name: str, buffer: Tensor) -> None:
        setattr(self, name, buffer)
        self.seen = {key: seen for key, seen in self.seen.items() if key[0] != name}

    def seen_from(self, name: str, device: torch.device) -> Tensor:
        """Return the used part of a buffer, as a tensor on a GPU that can read it."""
        return self.whole_from(name, device)[: self.num_blocks]

    def whole_from(self, name: str, device: torch.device) -> Tensor:
        """Return a buffer, as a tensor on a GPU that can read it, the same one until it grows."""
        if self.is_pinned and device.type == "cuda":
            if (name, device) not in self.seen:
                self.seen[name, device] = readable_from(device, getattr(self, name))
            return self.seen[name, device]
        return getattr(self, name)

    def gather(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, G, N, K * block_size, D)`` of blocks ``(B, G, N, K)``."""
        rows = rows_of(chosen)
        keys, values = (
            select(self.seen_from(name, chosen.device), rows).unflatten(0, chosen.shape).flatten(3, 4)
            for name in ("keys", "values")
        )
        return keys, values

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
        self.seen = {}
        for name in self.BUFFERS:
            vars(self).pop(name, None)
        self.num_blocks, self.is_pinned, self.is_shared = len(buffers["keys"]) if buffers else 0, is_pinned, False
        for name, states in buffers.items():
            self.set_buffer(name, self.grown(None, states, len(states)))
            getattr(self, name)[: len(states)] = states

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``."""
        selected = {name: states.index_select(1, rows.cpu()) for name, states in self.buffers.items()}
        self.set_buffers(selected, is_pinned=self.is_pinned)


def append_to(stores: Sequence[HostBlocks], keys: Tensor, values: Tensor) -> None:
    """Append blocks ``(L * B, G, N, block_size, D)`` of L layers, which have equally many.

    On a GPU, this waits for the copies.
    """
    index = keys.unflatten(3, (-1, stores[0].representative_size)).mean(4)
    for name, states in zip(HostBlocks.BUFFERS, (keys, values, index), strict=True):
        of_layers = states.unflatten(0, (len(stores), -1)).movedim(3, 1).contiguous()
        for store, own in zip(stores, of_layers, strict=True):
            store.write_after(name, own)
    if keys.is_cuda:
        torch.cuda.current_stream(keys.device).synchronize()
    for store in stores:
        store.num_blocks, store.is_shared = store.num_blocks + keys.shape[2], False


def rows_of(chosen: Tensor) -> Tensor:
    """Return the rows of blocks ``(B, G, N, K)`` in the flattened buffers.

    All N * K rows of a head are consecutive.
    """
    heads = torch.arange(chosen.shape[:2].numel(), device=chosen.device)
    return (chosen * len(heads) + heads.view(*chosen.shape[:2], 1, 1)).flatten()


def select(states: Tensor, rows: Tensor) -> Tensor:
    """Return blocks ``(R, block_size, D)``, on the device of ``rows``.

    Args:
        states: ``(N, B, G, block_size, D)``.
        rows: numbers of blocks in the flattened ``(N, B, G)``, ``(R,)``.
    """
    flat = states.flatten(0, 2).flatten(1)
    return flat.index_select(0, rows.to(flat.device)).unflatten(1, states.shape[3:]).to(rows.device)


def index_parts(blocks: HostBlocks, num_blocks: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the index of the first blocks in parts, on a device.

    Each is ``(B, G, blocks, num_representatives, D)``.
    """
    size = max(1, NUM_INDEX_BYTES // blocks.index[0].nbytes)
    for start in range(0, num_blocks, size):
        end = min(start + size, num_blocks)
        yield blocks.seen_from("index", device)[start:end].to(device).movedim(0, 2)
