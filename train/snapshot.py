"""Copies of the training state in host memory, taken while training goes on."""

import copy
import mmap
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..text import one_line

ALIGNMENT = 64  # bytes
NUM_PROBES = 16  # bytes
MOST_QUEUED = 2**30  # bytes


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in new host memory."""
    return tensor.to("cpu", copy=True)


class HostMemory:
    """Host memory that is reused by every snapshot. On a GPU it is pinned.

    A thread pins it, because that takes about a second for 3 GB. A snapshot is valid until the next
    one begins. Memory that is unmapped while it is pinned would make later copies to the same
    address go astray, so `close` ends the pinning, and every snapshot ends with random bytes whose
    copy is compared.

    Args:
        num_bytes: expected size of a snapshot. What is beyond it is allocated when it is copied.
    """

    def __init__(self, device: torch.device, num_bytes: int):
        self._device = device
        self._memory = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE))
        self._pinning_error = ""
        self._probe, self._copied_probe = b"", torch.empty(0)
        self._unpin: Callable[[], object] = lambda: None
        self._num_used = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sources: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._pinning = threading.Thread(target=self._pin, name="sinklm memory", daemon=True)
        self._pinning.start()

    def wait_if_large(self) -> None:
        """Wait for the copies that are queued, if their sources take much memory on the device."""
        if sum(source.numel() * source.element_size() for source in self._sources) > MOST_QUEUED and self._copied:
            self._copied.synchronize()
            self._sources.clear()

    def pinning_error(self) -> str:
        """Wait until the memory is pinned, and return why that failed; empty if it did not."""
        self._pinning.join()
        return self._pinning_error

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

    def close(self) -> None:
        """Give the memory back. Snapshots in it must not be used any more."""
        self._pinning.join()
        if self._copied is not None:
            self._copied.synchronize()
        self._unpin()

    def end(self) -> None:
        """End a snapshot, after its last copy."""
        self._probe = secrets.token_bytes(NUM_PROBES)
        probe = torch.frombuffer(bytearray(self._probe), dtype=torch.uint8).to(self._device)
        self._copied_probe = self.copy(probe)

    def wait_on_host(self) -> None:
        """Wait until the snapshot is complete. Any thread may call it.

        Raises:
            RuntimeError: the copy is wrong.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self._sources.clear()
        if bytes(self._copied_probe.tolist()) != self._probe:
            raise RuntimeError("the copy of the state in host memory is wrong: set checkpoint.asynchronous=false")

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
        if self._stream is None:
            return
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        runtime = torch.cuda.cudart()
        try:
            with torch.cuda.device(self._device):
                torch.cuda.check_error(runtime.cudaHostRegister(address, len(self._memory), 0))
        except Exception as error:  # an error of a thread is lost otherwise
            self._pinning_error = one_line(error)
        else:
            # The memory is an argument, so that it is not unmapped before.
            self._unpin = weakref.finalize(self, lambda memory: runtime.cudaHostUnregister(address), self._memory)
