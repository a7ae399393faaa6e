"""Copies of the training state in host memory, taken while training goes on."""

import contextlib
import copy
import mmap
import threading
import warnings
from typing import Any

import torch
from torch.utils import _pytree as pytree

ALIGNMENT = 64  # bytes


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in new host memory."""
    return tensor.to("cpu", copy=True)


class HostMemory:
    """Host memory that is reused by every snapshot. On a GPU it is pinned.

    A thread allocates it, because pinning takes about a second for 3 GB. A snapshot is valid until
    the next one begins.

    Args:
        num_bytes: expected size of a snapshot. What is beyond it is allocated when it is copied.
    """

    def __init__(self, device: torch.device, num_bytes: int):
        self._device = device
        self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE))
        self._num_used = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sources: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._pinning = threading.Thread(target=self._pin, name="sinklm memory", daemon=True)
        self._pinning.start()

    def begin(self) -> None:
        """Begin a snapshot, which overwrites the one before."""
        self._pinning.join()
        self._num_used = 0

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

    @torch.no_grad()
    def _copy_leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        if not leaf.numel():
            return torch.empty(leaf.shape, dtype=leaf.dtype)
        copied = self._take(leaf.numel() * leaf.element_size()).view(leaf.dtype).view(leaf.shape)
        copied.copy_(leaf, non_blocking=leaf.is_cuda)
        if leaf.is_cuda:
            self._sources.append(leaf)  # not freed while it is copied
        return copied

    def _take(self, num_bytes: int) -> torch.Tensor:
        """Return memory with a storage of its own, because torch.save writes whole storages."""
        start, end = self._num_used, self._num_used + num_bytes
        if end > len(self._memory):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        self._num_used = end + -end % ALIGNMENT
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=num_bytes, offset=start)

    def _pin(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # large pages are pinned faster
        if self._stream is None:
            return
        torch.cuda.set_device(self._device)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0))
        except RuntimeError as error:
            warnings.warn(
                f"saving is slower, because its memory cannot be pinned: {error}", RuntimeWarning, stacklevel=1
            )
