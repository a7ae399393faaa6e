"""The state of a cache: what its streams have read, and the keys and values that they keep."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .buffers import StreamingLayer, row_index
from .counters import StreamCounters
from .encodings import Rotary
from .layers import LayerPlan
from .record import TextRecord
from .steps import ChunkStep, DecodeStep, Pass, Step


class Streams:
    """The streams of a batch, which all layers of a model have read as far.

    Attributes:
        layers: the buffers of each layer.
        counters: None before the first pass.
        record: what was read, None before the first pass.
        num_since_rebase: inputs since the last `rebase`.
        is_ragged: whether rows have seen different numbers of tokens.
        has_failed: whether the last pass failed. Its token may be in a slot.
    """

    def __init__(self, plan: LayerPlan, layers: list[StreamingLayer]):
        self.plan, self.layers = plan, layers
        self.clear()

    def clear(self) -> None:
        """Forget all streams. The next pass starts new ones, with any batch size."""
        self.counters: StreamCounters | None = None
        self.record: TextRecord | None = None
        self.num_since_rebase = 0
        self.is_ragged = self.has_failed = False
        for layer in self.layers:
            layer.free()

    def __deepcopy__(self, memo: dict) -> "Streams":
        twin = copy.copy(self)
        twin.layers, twin.counters, twin.record = copy.deepcopy((self.layers, self.counters, self.record), memo)
        return twin

    @property
    def is_empty(self) -> bool:
        return self.counters is None

    @property
    def batch_size(self) -> int:
        """Number of streams, -1 before the first pass."""
        return -1 if self.counters is None else self.counters.num_seen.shape[0]

    @property
    def has_evicted(self) -> bool:
        """Whether a token of any row has left a layer, also for one whose pass failed."""
        if self.counters is None:
            return False
        return int(self.counters.num_seen.max()) + self.has_failed > self.plan.num_slots_of_smallest

    # -- A pass ----------------------------------------------------------------------------------

    def begin_pass(self, inputs: Tensor, is_token: Tensor | None) -> Pass:
        """Return a pass over inputs ``(B, T, …)``.

        Args:
            is_token: ``(B, T)``, False for padding; None if there is no padding.
        """
        batch_size, num_inputs = inputs.shape[:2]
        if self.counters is None or self.record is None:
            self.counters = StreamCounters.start(batch_size, inputs.device)
            self.record = TextRecord.start(batch_size, self.plan.shape.num_slots, inputs.device)
        elif self.counters.base.device != inputs.device:
            self.counters, self.record = self.counters.to(inputs.device), self.record.to(inputs.device)
        num_seen, base = self.counters.num_seen, self.counters.base
        groups = [(self.layers, group.shape, group.encoding) for group in self.plan.groups]
        steps: list[Step]
        if num_inputs == 1:
            steps = [DecodeStep(*group, num_seen, base, is_token) for group in groups]
        else:
            rows = slice(None) if self.is_ragged else slice(1)
            steps = [ChunkStep(*group, num_seen[rows], base[rows], num_inputs, is_token) for group in groups]
        return Pass(steps, self.plan.group_of_layer)

    def end_pass(self, step: Pass, inputs: Tensor, is_token: Tensor | None) -> None:
        """Count the tokens of a pass, which all layers have stored."""
        assert self.counters is not None
        assert self.record is not None
        self.record.add(inputs, is_token, self.counters.num_columns)
        self.counters.num_seen += step.num_new
        self.counters.num_columns += step.num_inputs

    # -- Phases ----------------------------------------------------------------------------------

    def rebase_before(self, num_inputs: int) -> None:
        """Count the next ``num_inputs`` inputs, after a `rebase` if one is due."""
        if self.num_since_rebase + num_inputs > self.plan.window + 1:
            self.rebase()
        self.num_since_rebase += num_inputs

    @torch.no_grad()
    def rebase(self) -> None:
        """Move all phases back: the window starts at phase S, and float32 angles stay accurate.

        This is done once per window, the largest one of all layers. A key is rotated back at most
        once while it is in the cache, so rounding errors do not accumulate, not even in bfloat16.
        """
        self.num_since_rebase = 0
        if self.counters is None:
            return
        base = (self.counters.num_seen - self.plan.num_slots).clamp(min=0)
        self._turn_windows((self.counters.base - base)[:, None])
        self.counters.base.copy_(base)

    def _turn_windows(self, steps: Tensor) -> None:
        """Rotate the keys of all windows by ``steps`` ``(B, 1)`` positions."""
        phases: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # of each encoding, on each device
        for index, layer in enumerate(self.layers):
            encoding = self.plan.group(index).encoding
            if isinstance(encoding, Rotary) and layer.is_allocated and layer.has_positions:
                like = layer.kept_keys
                key = id(encoding), like.device
                if key not in phases:
                    phases[key] = encoding.phases(steps.to(like.device), like)
                layer.turn_window(partial(encoding.turn, phases=phases[key]))

    # -- Rows and length -------------------------------------------------------------------------

    def map_rows(self, rows: Tensor) -> None:
        """Let row i continue the stream of row ``rows[i]``; the batch size may change.

        Raises:
            ValueError: there are no rows.
        """
        if self.counters is None or self.record is None:
            return
        if not len(rows):
            raise ValueError("no stream would be left: keep at least one row, or call reset()")
        self.counters.map_rows(rows)
        self.record.map_rows(rows)
        for layer in self.layers:
            layer.map_rows(rows)

    def restart_rows(self, rows: Sequence[int] | Tensor, sink_ids: list[int]) -> None:
        """Let some rows start again after the sinks, which they keep.

        Raises:
            ValueError: ``rows`` are not integers from 0 to B - 1.
        """
        if self.counters is None or self.record is None:
            return
        index = row_index(rows, self.batch_size, self.counters.base.device)
        self.counters.num_seen[index] = len(sink_ids)
        self.counters.base[index] = 0
        self.record.restart_rows(index, sink_ids)
        for layer in self.layers:
            layer.restart_rows(index)
        self.is_ragged = True

    def remove_last(self, num_removed: int) -> None:
        """Remove the last tokens of each row.

        Raises:
            ValueError: fewer tokens were seen, a token has left a layer, or there was padding.
                Padding is not stored, so the rows could not be cut at the same input.
        """
        if self.counters is None or self.record is None:
            raise ValueError(f"crop({-num_removed}): the cache has read no token")
        if self.is_ragged:
            raise ValueError("cannot remove tokens from a batch that had padding: call reset() and read the text again")
        num_seen = int(self.counters.num_seen[0])  # of all rows: there was no padding
        if self.has_evicted:
            raise ValueError(
                f"cannot remove tokens: {num_seen} tokens were seen, and some have left the cache of {self.plan}. "
                "Assisted generation and prompt lookup remove tokens: turn them off or use a larger window"
            )
        if num_removed > num_seen:
            raise ValueError(f"crop({-num_removed}): only {num_seen} tokens were seen")
        if self.record.is_known:
            self.record.remove(num_removed, self.counters.num_columns)
        for layer in self.layers:
            if layer.is_allocated:
                num_before = self.counters.num_seen.to(layer.kept_keys.device)
                layer.crop(num_before, num_before - num_removed)
        self.counters.num_seen -= num_removed
        self.counters.num_columns -= num_removed
