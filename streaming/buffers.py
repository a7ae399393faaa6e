"""Buffers of an attention layer: keys and values in slots, and the original kept keys."""

import copy
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rule import StreamShape

if TYPE_CHECKING:
    from .layer_memory import LayerMemory
    from .steps import ChunkStep, DecodeStep, Step


class StaticBuffers:
    """Tensors with static addresses, which are allocated with the first states.

    Attributes:
        BUFFERS: their names.
    """

    BUFFERS: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.is_allocated = False

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.BUFFERS} if self.is_allocated else {}

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Replace the buffers by copies with static addresses."""
        for name in self.BUFFERS:
            setattr(self, name, static_copy(buffers[name]))
        self.is_allocated = True

    def free(self) -> None:
        for name in self.buffers:
            delattr(self, name)
        self.is_allocated = False


class StreamingLayer(StaticBuffers):
    """Static buffers of one layer, allocated with the first keys and written in place.

    Attributes:
        has_positions: False if the layer's keys are not rotated.
        memory: what has left the window, if the cache has a memory.
        keys, values: ``(B, G, S + W + 1, D)``, slots as in `StreamShape`.
        kept_keys: ``(B, G, S + 1, D)``, the kept keys at phases 0 … S - 1, from which the first S
            slots of ``keys`` are rotated for every step. The last row is scratch space: tokens that
            are not kept are written to it.
        num_arrived: ``(B, G)``, counter of the decoding kernel, 0 between steps.
    """

    BUFFERS: tuple[str, ...] = ("keys", "values", "kept_keys", "num_arrived")

    keys: Tensor
    values: Tensor
    kept_keys: Tensor
    num_arrived: Tensor

    def __init__(self, shape: StreamShape, has_positions: bool = True):
        super().__init__()
        self.shape, self.has_positions = shape, has_positions
        self.memory: LayerMemory | None = None

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Allocate the buffers for states like these ``(B, G, T, D)`` if they do not exist yet.

        If the layer has moved to another device since, they move there.

        Raises:
            ValueError: the states have another data type than those in the buffers.
        """
        if not self.is_allocated:
            self._allocate(key, value)
            self.is_allocated = True
        elif self.kept_keys.dtype != key.dtype:
            raise ValueError(
                f"the cache has states in {self.kept_keys.dtype}, and the model now computes in {key.dtype}: call "
                "reset(), or change the model (or autocast) back"
            )
        elif self.kept_keys.device != key.device:
            self.set_buffers({name: buffer.to(key.device) for name, buffer in self.buffers.items()})

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        self.keys = zeros_like_heads(key, self.shape.num_slots)
        self.values = zeros_like_heads(value, self.shape.num_slots)
        self.kept_keys = zeros_like_heads(key, self.shape.num_kept + 1)
        self.num_arrived = static_zeros(key.shape[:2], torch.int32, key.device)

    def write(self, key: Tensor, value: Tensor, step: "DecodeStep") -> None:
        """Store the key and value ``(B, G, 1, D)`` of the next token of each row."""
        self.keys[step.rows, :, step.slot] = key[:, :, 0]
        self.values[step.rows, :, step.slot] = value[:, :, 0]
        if self.shape.num_kept:
            self.kept_keys[step.rows, :, step.kept_row] = key[:, :, 0]

    def read(self, step: "Step") -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, G, S + W + 1, D)`` of all slots.

        The first S keys are those of `kept_keys`, or rotated. The caller may overwrite them.
        """
        return self.keys, self.values

    def store(self, key: Tensor, value: Tensor, step: "ChunkStep") -> None:
        """Store the keys and values ``(B, G, T, D)`` of a chunk in the slots they have after it."""
        is_new, columns = step.replacements
        self.keys.copy_(torch.where(is_new, gather_columns(key, columns), self.keys))
        self.values.copy_(torch.where(is_new, gather_columns(value, columns), self.values))
        num_kept = self.shape.num_kept
        kept = self.kept_keys[:, :, :num_kept]
        kept.copy_(torch.where(is_new[:, :, :num_kept], self.keys[:, :, :num_kept], kept))

    @property
    def first_values(self) -> Tensor:
        """The values ``(B, G, S, D)`` of the kept tokens."""
        return self.values[:, :, : self.shape.num_kept]

    def turn_window(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Rotate the keys of the window."""
        ring = self.keys[:, :, self.shape.num_kept :]
        ring.copy_(turn(ring))

    def restart_rows(self, rows: Tensor) -> None:
        """Restore the kept keys that steps have rotated, for rows that only keep sinks."""
        if self.is_allocated:
            rows, num_kept = rows.to(self.keys.device), self.shape.num_kept
            self.keys[rows, :, :num_kept] = self.kept_keys[rows, :, :num_kept]

    def crop(self, num_before: Tensor, num_after: Tensor) -> None:
        """Remove the last tokens of each row ``(B,)``; none has left the layer."""

    @property
    def num_bytes(self) -> int:
        own = sum(buffer.nbytes for name, buffer in self.buffers.items() if name != "num_arrived")
        return own if self.memory is None else own + self.memory.num_bytes

    def free(self) -> None:
        if self.memory is not None:
            self.memory.free()
        super().free()

    def empty_twin(self) -> "StreamingLayer":
        return StreamingLayer(self.shape, self.has_positions)

    def __deepcopy__(self, memo: dict) -> "StreamingLayer":
        twin = self.empty_twin()
        twin.memory = copy.deepcopy(self.memory, memo)
        if self.is_allocated:
            twin.set_buffers(self.buffers)
        return twin

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``; the batch size may change."""
        for name, buffer in self.buffers.items():
            setattr(self, name, select_rows(buffer, rows))
        if self.memory is not None:
            self.memory.map_rows(rows)


def zeros_like_heads(states: Tensor, length: int) -> Tensor:
    """Return a zero buffer ``(B, G, length, D)`` for states ``(B, G, T, D)``."""
    return static_zeros((*states.shape[:2], length, states.shape[3]), states.dtype, states.device)


@torch.compiler.disable
def static_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a zero buffer with a static address, as CUDA graphs require.

    The buffer can also be used outside of `torch.inference_mode`.
    """
    with torch.inference_mode(False):
        buffer = torch.zeros(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def static_copy(states: Tensor) -> Tensor:
    """Copy a tensor to a new buffer made by `static_zeros`."""
    with torch.no_grad():
        return static_zeros(tuple(states.shape), states.dtype, states.device).copy_(states)


def select_rows(buffer: Tensor, rows: Tensor) -> Tensor:
    """Select rows of a buffer ``(B, …)``.

    If their number does not change, this is done in place: a captured graph may read the buffer.
    """
    selected = buffer.index_select(0, rows.to(buffer.device))
    return buffer.copy_(selected) if selected.shape == buffer.shape else static_copy(selected)


def row_index(rows: Any, batch_size: int, device: torch.device) -> Tensor:
    """Return the numbers of some rows of a batch as a tensor.

    Raises:
        ValueError: they are not a sequence or tensor of integers from 0 to ``batch_size - 1``.
    """
    found = rows.tolist() if hasattr(rows, "tolist") else rows
    is_index = isinstance(found, list | tuple | range) and all(
        isinstance(row, Integral) and not isinstance(row, bool) and 0 <= int(row) < batch_size for row in found
    )
    if not is_index:
        raise ValueError(
            f"rows is {str(found)[:80]}: pass a sequence or tensor of row numbers from 0 to {batch_size - 1}"
        )
    return torch.tensor(list(map(int, found)), dtype=torch.long, device=device)


def gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Gather ``columns`` ``(B or 1, N)`` of keys or values ``(B, G, T, D)`` to ``(B, G, N, D)``."""
    index = columns[:, None, :, None].expand(states.shape[0], states.shape[1], -1, states.shape[3])
    return torch.gather(states, 2, index)
