"""Memory beyond the window: blocks of evicted tokens that come back when queries look for them.

The tokens of a stream are divided into blocks. When a block is complete, its keys and values are
copied to host memory, and a few representative keys to an index. At the start of every interval,
each head of keys chooses the blocks to which the last queries attend most, and these are copied
back. The queries of the interval see them in addition to the cache. (InfLLM, Xiao et al. 2024,
arXiv 2402.04617, is the idea.)

Every chosen block stands immediately before the window: its tokens have the distances
``W + 1 … W + block_size`` to each query. So positions never exceed ``S + W + block_size``, however
long the stream is. A choice depends on earlier tokens only, so passes of any length have the same
result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.sink_column import SinkColumn, merge_column
from .buffers import StreamingLayer, gather_columns, select_rows, static_copy, static_zeros, zeros_like_heads
from .encodings import Rotary
from .layers import LayerPlan
from .memory_blocks import HostBlocks
from .rule import StreamShape

if TYPE_CHECKING:
    from .counters import StreamCounters
    from .steps import ChunkStep, Softmax, Step


@dataclass(frozen=True)
class MemoryOptions:
    """Size of a memory beyond the window.

    Args:
        block_size: tokens in a block.
        num_blocks: maximum number of blocks that each head of keys sees at a time.
        interval: tokens from one choice of blocks to the next.
        num_representatives: keys of each block in the index.

    Raises:
        ValueError: a number is below 1, ``num_representatives`` does not divide ``block_size``, or
            ``interval`` exceeds it.
    """

    block_size: int = 64
    num_blocks: int = 8
    interval: int = 8
    num_representatives: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} of the memory is {value}: it must be at least 1")
        if self.block_size % self.num_representatives:
            raise ValueError(
                f"num_representatives of the memory is {self.num_representatives}: it must divide the block_size of "
                f"{self.block_size}"
            )
        if self.interval > self.block_size:
            raise ValueError(
                f"interval of the memory is {self.interval}: it must be at most the block_size of {self.block_size}"
            )


class LayerMemory:
    """The memory of one layer.

    In its frame, the tokens of a block have the phases ``0 … block_size - 1``, and all queries have
    the phase ``W + block_size``.

    Attributes:
        blocks: the complete blocks, in host memory.
        keys, values: ``(B, G, num_blocks * block_size, D)``, of the chosen blocks.
        num_chosen: ``()``, the number of chosen blocks.
        queries: ``(B, H, interval + 1, D)``, the last ones times the factor of the scores; that of
            token t is in row ``t % (interval + 1)``. A step that fails overwrites no needed one.
    """

    BUFFERS = ("keys", "values", "num_chosen", "queries")

    keys: Tensor
    values: Tensor
    num_chosen: Tensor
    queries: Tensor

    def __init__(self, options: MemoryOptions, shape: StreamShape, encoding: Rotary):
        self.options, self.shape, self.encoding = options, shape, encoding
        self.blocks = HostBlocks(options.num_representatives)
        self.is_allocated = False

    # -- Attention -------------------------------------------------------------------------------

    def add_to(
        self, softmax: "Softmax", step: "Step", layer: StreamingLayer, query: Tensor, key: Tensor, value: Tensor
    ) -> "Softmax":
        """Return the softmax of a pass with the memory in its column.

        Args:
            layer: it does not have the new keys and values yet.
            query: ``(B, H, T, D)`` of the new tokens.
            key, value: ``(B, G, T, D)`` of the new tokens.
        """
        self.allocate(query, key, value)
        if layer.has_positions:
            if step.memory_phases is None:
                steps = self.shape.window + self.options.block_size - step.position_ids
                step.memory_phases = self.encoding.phases(steps, like=query)
            query = self.encoding.turn(query, step.memory_phases)
        if step.is_decoding:
            out, lse = self.attend(query, softmax)
            row = step.num_seen.remainder(self.options.interval + 1)
            self.queries[step.rows, :, row] = query[:, :, 0] * softmax.scaling
        else:
            self.store_chunk(layer, step, key, value)
            num_kept = self.shape.num_kept
            kept = torch.cat((layer.kept_keys[:, :, : step.first], key[:, :, :num_kept]), dim=2)[:, :, :num_kept]
            out, lse = self.attend_chunk(step, query, self.turned_kept(layer, kept), softmax)
        if softmax.column is not None:
            out, lse = merge_column(out, lse, softmax.column)
        return softmax._replace(column=SinkColumn(lse, out))

    def attend(self, query: Tensor, softmax: "Softmax") -> tuple[Tensor, Tensor]:
        """Return the attention of turned queries to the chosen blocks, and its log-sum-exp.

        Without any block, they are 0 and -inf.

        Args:
            query: ``(B, H, T, D)``.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        grouped = query.unflatten(1, (self.keys.shape[1], -1)).to(dtype)  # (B, G, H / G, T, D)
        scores = grouped @ self.keys[:, :, None].mT.to(dtype) * softmax.scaling
        if softmax.softcap is not None:
            scores = softmax.softcap * (scores / softmax.softcap).tanh()
        is_chosen = torch.arange(self.keys.shape[2], device=query.device) < self.num_chosen * self.options.block_size
        scores = scores.masked_fill(~is_chosen, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp(min=torch.finfo(dtype).min)[..., None]).exp()
        out = weights.to(self.values.dtype) @ self.values[:, :, None]
        return out.flatten(1, 2), lse.flatten(1, 2)

    def attend_chunk(
        self, step: "ChunkStep", query: Tensor, kept: Tensor, softmax: "Softmax"
    ) -> tuple[Tensor, Tensor]:
        """Choose blocks and attend to them, interval after interval, as single tokens do.

        Args:
            kept: as in `choose`.
        """
        first, end, interval = step.first, step.first + step.num_inputs, self.options.interval
        queries = torch.cat((self.queries_before(first), query * softmax.scaling), dim=2)
        parts = []
        while first < end:
            until = min(first - first % interval + interval, end)
            start = first - step.first
            if first % interval == 0:
                self.choose(queries[:, :, start : start + interval], kept, first)
            parts.append(self.attend(query[:, :, start : until - step.first], softmax))
            first = until
        self.queries[:, :, self.rows_before(end)] = queries[:, :, -interval:]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    # -- Choosing --------------------------------------------------------------------------------

    def choose_before(self, layer: StreamingLayer, token: int) -> None:
        """Choose the blocks for the interval that starts with the next token."""
        kept = layer.kept_keys[:, :, : self.shape.num_kept]
        self.choose(self.queries_before(token), self.turned_kept(layer, kept), token)

    def queries_before(self, token: int) -> Tensor:
        """Return the stored queries ``(B, H, interval, D)`` of the tokens before a token."""
        return self.queries[:, :, self.rows_before(token)]

    def rows_before(self, token: int) -> Tensor:
        tokens = torch.arange(token - self.options.interval, token, device=self.queries.device)
        return tokens.remainder(self.options.interval + 1)

    def choose(self, queries: Tensor, kept: Tensor, token: int) -> None:
        """Choose the blocks for the interval that starts with a token.

        Args:
            queries: of the tokens before it, see `queries_before`.
            kept: the kept keys ``(B, G, S, D)`` in the frame of the memory.
        """
        num_evicted = max(0, (token - self.shape.num_cached) // self.options.block_size)
        num_chosen = min(num_evicted, self.options.num_blocks)
        self.num_chosen.fill_(num_chosen)
        if num_chosen == 0:
            return
        chosen = self.weights(queries, kept, num_evicted).topk(num_chosen, dim=-1).indices
        num_tokens = num_chosen * self.options.block_size
        for buffer, states in zip((self.keys, self.values), self.blocks.gather(chosen), strict=True):
            buffer[:, :, :num_tokens] = states.to(buffer.device)

    def weights(self, queries: Tensor, kept: Tensor, num_blocks: int) -> Tensor:
        """Return how much the queries attend to the first blocks, ``(B, G, num_blocks)``.

        Each block has the score of its best representative. The kept keys compete with the blocks:
        a query that attends to a sink looks for nothing.
        """
        dtype = torch.promote_types(queries.dtype, torch.float32)
        grouped = queries.unflatten(1, (self.keys.shape[1], -1)).flatten(2, 3).to(dtype)  # (B, G, queries, D)
        scores = [grouped @ kept.mT.to(dtype)]
        for index in self.blocks.index_parts(num_blocks):  # (B, G, blocks, representatives, D)
            index = index.to(queries.device)
            part = grouped @ index.flatten(2, 3).mT.to(dtype)
            scores.append(part.unflatten(-1, index.shape[2:4]).amax(-1))
        weights = torch.cat(scores, dim=-1).softmax(-1)
        return weights[..., kept.shape[2] :].sum(2)

    def turned_kept(self, layer: StreamingLayer, kept: Tensor) -> Tensor:
        """Turn kept keys ``(B, G, S, D)`` from their phases in the layer to the frame of the memory."""
        if kept.shape[2] == 0 or not layer.has_positions:
            return kept
        # A query, which has the phase W + block_size, sees kept key i at the distance S + W - i.
        shift = torch.full((1, 1), self.options.block_size - self.shape.num_kept, device=kept.device)
        return self.encoding.turn(kept, self.encoding.phases(shift, like=kept))

    # -- Storing ---------------------------------------------------------------------------------

    @property
    def num_stored(self) -> int:
        """Number of tokens after the kept ones that are in blocks."""
        return len(self.blocks) * self.options.block_size

    def store_complete(self, layer: StreamingLayer, num_seen: int, base: Tensor) -> None:
        """Store the blocks that are complete after ``num_seen`` tokens, which the layer holds."""
        start = self.shape.num_kept + self.num_stored
        tokens = torch.arange(start, max(start, num_seen), device=self.queries.device)
        tokens = tokens[: len(tokens) // self.options.block_size * self.options.block_size]
        if len(tokens):
            slots = self.shape.slot_of(tokens)[None]
            keys, values = gather_columns(layer.keys, slots), gather_columns(layer.values, slots)
            self.store(layer, keys, values, tokens, base)

    def store_chunk(self, layer: StreamingLayer, step: "ChunkStep", key: Tensor, value: Tensor) -> None:
        """Store the blocks that are complete with a chunk's keys and values ``(B, G, T, D)``."""
        start, first = self.shape.num_kept + self.num_stored, step.first
        num_tokens = (first + step.num_inputs - start) // self.options.block_size * self.options.block_size
        if num_tokens <= 0:
            return
        tokens = torch.arange(start, start + num_tokens, device=key.device)
        before, new = tokens[tokens < first], tokens[tokens >= first] - first
        slots = self.shape.slot_of(before)[None]
        keys = torch.cat((gather_columns(layer.keys, slots), key[:, :, new]), dim=2)
        values = torch.cat((gather_columns(layer.values, slots), value[:, :, new]), dim=2)
        self.store(layer, keys, values, tokens, step.base)

    def store(self, layer: StreamingLayer, keys: Tensor, values: Tensor, tokens: Tensor, base: Tensor) -> None:
        """Append the blocks of consecutive tokens, whose keys have the phases ``tokens - base``."""
        if layer.has_positions:
            in_block = (tokens - self.shape.num_kept).remainder(self.options.block_size)
            keys = self.encoding.turn(keys, self.encoding.phases((in_block - tokens + base[0])[None], like=keys))
        size = self.options.block_size
        self.blocks.append(keys.unflatten(2, (-1, size)), values.unflatten(2, (-1, size)))

    # -- Buffers ---------------------------------------------------------------------------------

    def allocate(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Allocate the buffers for states like these, or move them to their device."""
        if not self.is_allocated:
            num_tokens = self.options.num_blocks * self.options.block_size
            self.keys, self.values = zeros_like_heads(key, num_tokens), zeros_like_heads(value, num_tokens)
            self.num_chosen = static_zeros((), torch.long, key.device)
            self.queries = zeros_like_heads(query, self.options.interval + 1)
            self.is_allocated = True
        elif self.queries.device != query.device:
            self.set_buffers({name: buffer.to(query.device) for name, buffer in self.buffers.items()})

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.BUFFERS} if self.is_allocated else {}

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Replace the buffers by copies with static addresses."""
        for name in self.BUFFERS:
            setattr(self, name, static_copy(buffers[name]))
        self.is_allocated = True

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def free(self) -> None:
        for name in self.buffers:
            delattr(self, name)
        self.blocks, self.is_allocated = HostBlocks(self.options.num_representatives), False

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``; the batch size may change."""
        self.blocks.map_rows(rows)
        for name, buffer in self.buffers.items():
            if name != "num_chosen":
                setattr(self, name, select_rows(buffer, rows))

    def __deepcopy__(self, memo: dict) -> "LayerMemory":
        twin = LayerMemory(self.options, self.shape, self.encoding)
        if self.is_allocated:
            twin.set_buffers(self.buffers)
            twin.blocks.set_buffers(self.blocks.buffers, is_pinned=self.blocks.is_pinned)
        return twin


class StreamMemory:
    """The memories of a cache's layers.

    Layers with a window of their own have none: they never see what has left their window.

    Attributes:
        num_seen: tokens that were seen, None if only the counters on the device know.
    """

    def __init__(self, options: MemoryOptions, layers: Sequence[StreamingLayer]):
        self.options = options
        self.layers = [(layer, layer.memory) for layer in layers if layer.memory is not None]
        self.num_seen: int | None = None

    @classmethod
    def of(cls, options: MemoryOptions, plan: LayerPlan, layers: Sequence[StreamingLayer]) -> "StreamMemory":
        """Give the layers of a new cache a memory.

        Raises:
            ValueError: the model has no rotary positions, or all its layers have windows of their
                own, or a block is longer than the window.
        """
        if options.block_size > plan.shape.window:
            raise ValueError(
                f"the memory's block_size is {options.block_size}: it must be at most the window of {plan.shape.window}"
            )
        for index, layer in enumerate(layers):
            shape, encoding = plan.group(index).shape, plan.group(index).encoding
            if not isinstance(encoding, Rotary):
                raise ValueError("a memory requires rotary positions, and this model has ALiBi: use memory=None")
            if shape == plan.shape:
                layer.memory = LayerMemory(options, shape, encoding)
        memory = cls(options, layers)
        if not memory.layers:
            raise ValueError(
                f"a memory would have no effect: all layers have windows of their own ({plan}). Use memory=None"
            )
        return memory

    def before_pass(self, counters: "StreamCounters | None", num_inputs: int) -> None:
        """Store complete blocks, and choose those for a single token that starts an interval."""
        if counters is None:
            self.num_seen = num_inputs
            return
        first = int(counters.num_seen[0]) if self.num_seen is None else self.num_seen
        self.num_seen = first + num_inputs
        for layer, memory in self.layers:
            memory.store_complete(layer, first, counters.base)
            if num_inputs == 1 and first % self.options.interval == 0:
                memory.choose_before(layer, first)

    def crop(self, num_seen: int) -> None:
        """Remove the blocks that are not complete after ``num_seen`` tokens."""
        self.num_seen = None
        for _, memory in self.layers:
            memory.blocks.truncate(max(0, num_seen - memory.shape.num_kept) // self.options.block_size)

    @property
    def num_host_bytes(self) -> int:
        return sum(memory.blocks.num_bytes for _, memory in self.layers)
