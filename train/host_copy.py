"""Copies values from the device to the host without blocking the host."""

from typing import Any

import torch


class HostCopy:
    """An asynchronous copy, queued on the device's current stream."""

    def __init__(self, values: torch.Tensor):
        self._values = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def read(self) -> Any:
        """Wait for the copy, but not for later work. Returns the values as by `Tensor.tolist`."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
