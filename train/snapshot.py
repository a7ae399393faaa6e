"""Copies of the training state in host memory, taken while training goes on."""

import copy
from typing import Any

import torch
from torch.utils import _pytree as pytree

SMALL = 2**20  # bytes; torch allocates larger pinned memory in powers of two


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in new host memory."""
    return tensor.to("cpu", copy=True)


class HostMemory:
    """Host memory that is reused by every snapshot. On a GPU it is pinned.

    A snapshot is valid until the next one begins.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._buffers: list[torch.Tensor] = []
        self._num_used = 0
        self._sources: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def copy(self, state: Any) -> Any:
        """Return a copy of nested dictionaries and lists with their tensors in host memory.

        On a GPU, the copy is only queued. It runs beside the computations that follow, until
        `wait_on_device`. Every call adds to the same snapshot, until `wait_on_host`.
        """
        if self._stream is None:
            return pytree.tree_map(self._copy_leaf, state)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copied = pytree.tree_map(self._copy_leaf, state)
            self._copied = self._stream.record_event()
        return copied

    def wait_on_device(self) -> None:
        """Let the device's computations that are queued from now on wait until it is copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait_on_host(self) -> None:
        """Wait until the snapshot is complete. Any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()
        self._sources.clear()

    def begin(self) -> None:
        """Begin a snapshot, which overwrites the one before."""
        self._num_used = 0

    @torch.no_grad()
    def _copy_leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        num_bytes = leaf.numel() * leaf.element_size()
        if not num_bytes:
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        buffer = self._take(num_bytes)
        copied = buffer.view(leaf.dtype).view(leaf.shape)
        copied.copy_(leaf, non_blocking=leaf.is_cuda)
        if leaf.is_cuda:
            self._sources.append(leaf)  # not freed while it is copied
        return copied

    def _take(self, num_bytes: int) -> torch.Tensor:
        """Return the next buffer. Its size is exact, because torch.save writes whole storages."""
        if self._num_used == len(self._buffers):
            self._buffers.append(self._allocate(num_bytes))
        elif self._buffers[self._num_used].numel() != num_bytes:
            self._buffers[self._num_used] = self._allocate(num_bytes)
        self._num_used += 1
        return self._buffers[self._num_used - 1]

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self._is_cuda and num_bytes < SMALL:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if self._is_cuda:  # without pinned memory, the copy would be slower and block Python
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), num_bytes, 0))
        return buffer
