"""The memory of one layer: it stores blocks, chooses among them and attends to the chosen ones."""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from ..models.sink_column import SinkColumn, merge_column
from . import kernels
from .buffers import StaticBuffers, StreamingLayer, gather_columns, select_rows, static_zeros, zeros_like_heads
from .encodings import Rotary
from .memory_blocks import HostBlocks, index_parts
from .rule import StreamShape

if TYPE_CHECKING:
    from .memory import MemoryOptions
    from .steps import ChunkStep, DecodeStep, Softmax, Step

NUMBERS = count()
MEMORIES: "WeakValueDictionary[int, LayerMemory]" = WeakValueDictionary()
NEWER = 2.0**-20  # by which a block weighs more than the one before it
NUM_BYTES = 2**26  # of scores and chosen blocks of a chunk that are on the device at a time

States = tuple[Tensor, Tensor, Tensor]


def host_number(dtype: torch.dtype, value: int = 0) -> Tensor:
    """Return a number ``()`` on the host, which a compiled graph reads each time."""
    return static_zeros((), dtype, torch.device("cpu")).fill_(value)


def grouped_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return unscaled scores of N intervals, in float32 or float64, also under autocast.

    Args:
        queries: ``(B, H, N, T, D)``.
        keys: ``(B, G, N or 1, K, D)``; G divides H.

    Returns:
        ``(B, G, N, H / G * T, K)``.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.unflatten(1, (keys.shape[1], -1)).movedim(2, 3).flatten(3, 4)
    with torch.autocast(queries.device.type, enabled=False):
        return grouped.to(dtype) @ keys.mT.to(dtype)


def with_column(softmax: "Softmax", out: Tensor, lse: Tensor) -> "Softmax":
    """Return a softmax with more keys in its column.

    Args:
        out: attention to these keys alone, ``(B, H, T, D)``.
        lse: log-sum-exp of its scores, ``(B, H, T)``.
    """
    if softmax.column is not None:
        out, lse = merge_column(out, lse, softmax.column)
    return softmax._replace(column=SinkColumn(lse, out))


class LayerMemory(StaticBuffers):
    """The memory of one layer.

    In its frame, the tokens of a block have the phases ``0 … block_size - 1``, and all queries have
    the phase ``W + block_size``.

    Attributes:
        blocks: the complete blocks, in host memory.
        keys, values: ``(B, G, num_blocks * block_size, D)``, of the chosen blocks.
        num_chosen: ``()``, the number of chosen blocks.
        queries: ``(B, H, interval + 1, D)``, the last ones times the factor of the scores; that of
            token t is in row ``t % (interval + 1)``. A step that fails overwrites no needed one.
        chooses: ``()`` on the host, whether a pass over one token begins an interval. It is
            shared by all layers.
        number: of this memory in `MEMORIES`.
    """

    BUFFERS = ("keys", "values", "num_chosen", "queries")

    keys: Tensor
    values: Tensor
    num_chosen: Tensor
    queries: Tensor

    def __init__(self, options: "MemoryOptions", shape: StreamShape, encoding: Rotary):
        super().__init__()
        self.options, self.shape, self.encoding = options, shape, encoding
        self.blocks = HostBlocks(options.representative_size)
        self.chooses = host_number(torch.bool)
        self.choice: kernels.BlockChoice | None = None  # if kernels can choose the blocks
        self.number = host_number(torch.int64, next(NUMBERS))
        MEMORIES[int(self.number)] = self

    # -- Attention -------------------------------------------------------------------------------

    def choose_in(self, step: "DecodeStep", layer: StreamingLayer, query: Tensor, scaling: float) -> None:
        """Choose the blocks of an interval if it begins with the token of a pass.

        Args:
            query: ``(B, H, 1, D)``.
        """
        states = self.queries, self.keys, self.values, self.num_chosen
        where = query, layer.kept_keys, step.num_seen, step.base
        if torch.compiler.is_compiling():
            choose_blocks(*where, *states, self.chooses, self.number, scaling, layer.has_positions)
        elif self.chooses:
            self.choose_for_token(*where, *states, scaling, layer.has_positions)

    def add_to_token(self, softmax: "Softmax", step: "DecodeStep", layer: StreamingLayer, query: Tensor) -> "Softmax":
        """Return the softmax of a pass over one token with the memory in its column.

        `kernels.decode_attention` includes this.

        Args:
            query: ``(B, H, 1, D)``.
        """
        query = self.turned(query, step, layer)
        self.queries[step.rows, :, self.row_of(step.num_seen)] = query[:, :, 0] * softmax.scaling
        return with_column(softmax, *self.attend_chosen(query, softmax))

    def add_to_chunk(self, softmax: "Softmax", step: "ChunkStep", layer: StreamingLayer, states: States) -> "Softmax":
        """Return the softmax of a pass over a chunk with the memory in its column.

        Args:
            layer: it has not stored the new keys and values yet.
            states: queries ``(B, H, T, D)``, keys and values ``(B, G, T, D)`` of the chunk.
        """
        query, key, value = self.turned(states[0], step, layer), *states[1:]
        self.store_chunk(layer, step, key, value)
        first, end, num_kept = step.first, step.first + step.num_inputs, self.shape.num_kept
        recent = torch.cat((self.queries_before(first), query * softmax.scaling), dim=2)
        self.queries[:, :, self.rows_before(end)] = recent[:, :, -self.options.interval :]
        if self.num_evicted(end - 1) == 0:
            return softmax
        kept = torch.cat((layer.kept_keys[:, :, :first], key[:, :, :num_kept]), dim=2)[:, :, :num_kept]
        outs, lses = zip(
            *self.attend_intervals(query, recent, self.turned_kept(kept, layer.has_positions), first, softmax),
            strict=True,
        )
        return with_column(softmax, torch.cat(outs, dim=2), torch.cat(lses, dim=2))

    def turned(self, query: Tensor, step: "Step", layer: StreamingLayer) -> Tensor:
        """Turn queries to the frame of the memory."""
        if not layer.has_positions:
            return query
        if step.memory_phases is None:
            steps = self.shape.window + self.options.block_size - step.position_ids
            step.memory_phases = self.encoding.phases(steps, like=query)
        return self.encoding.turn(query, step.memory_phases)

    def attend_intervals(
        self, query: Tensor, recent: Tensor, kept: Tensor, first: int, softmax: "Softmax"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the results of `attend` for consecutive parts of a chunk.

        Args:
            query: turned, ``(B, H, T, D)``.
            recent: as `queries`, of the tokens from ``first - interval`` on.
            kept: as in `choose`.
            first: index of the chunk's first token.
        """
        interval, num_inputs = self.options.interval, query.shape[2]
        num_begun = min(-first % interval, num_inputs)  # tokens of an interval that began before
        if num_begun:
            yield self.attend_chosen(query[:, :, :num_begun], softmax)
        num_tokens = interval * self.num_intervals(len(query) * query.shape[1], self.num_evicted(first + num_inputs))
        for start in range(num_begun, num_inputs, num_tokens):
            part = query[:, :, start : start + num_tokens]
            begins = range(first + start, first + start + part.shape[2], interval)
            if self.num_evicted(begins[-1]) == 0:
                yield self.attend_chosen(part, softmax)  # none
                continue
            padded = F.pad(part, (0, 0, 0, -part.shape[2] % interval))
            queries = recent[:, :, start + 1 : start + 1 + padded.shape[2]].unflatten(2, (-1, interval))
            index = index_parts(self.blocks, self.num_evicted(begins[-1]), query.device)
            chosen, num_chosen = self.choose(queries, kept, begins, index)
            keys, values = self.blocks.gather(chosen)
            self.keep(keys[:, :, -1], values[:, :, -1], num_chosen[-1])
            out, lse = self.attend(padded.unflatten(2, (-1, interval)), keys, values, num_chosen, softmax)
            yield out.flatten(2, 3)[:, :, : part.shape[2]], lse.flatten(2, 3)[:, :, : part.shape[2]]

    def num_intervals(self, num_heads: int, num_blocks: int) -> int:
        """Return for how many intervals blocks are chosen at a time.

        Args:
            num_heads: of the queries of all rows.
            num_blocks: to choose from.
        """
        num_scores = num_heads * self.options.interval * num_blocks * (2 + self.options.num_representatives)
        return max(1, NUM_BYTES // (self.keys.nbytes + self.values.nbytes + 4 * num_scores))

    def attend_chosen(self, query: Tensor, softmax: "Softmax") -> tuple[Tensor, Tensor]:
        """Return attention and log-sum-exp of turned queries ``(B, H, T, D)`` to `keys`."""
        states = query[:, :, None], self.keys[:, :, None], self.values[:, :, None]
        out, lse = self.attend(*states, self.num_chosen[None], softmax)
        return out[:, :, 0], lse[:, :, 0]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, num_chosen: Tensor, softmax: "Softmax"
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention of the queries of N intervals to the blocks chosen for them.

        Args:
            query: turned, ``(B, H, N, T, D)``.
            keys, values: of the blocks, ``(B, G, N, K, D)``.
            num_chosen: ``(N,)``, how many of the blocks are visible.

        Returns:
            The output ``(B, H, N, T, D)`` and the log-sum-exp of the scores ``(B, H, N, T)``; 0 and
            -inf without any block.
        """
        scores, num_tokens = grouped_scores(query, keys) * softmax.scaling, query.shape[3]
        if softmax.softcap is not None:
            scores = softmax.softcap * (scores / softmax.softcap).tanh()
        columns = torch.arange(keys.shape[3], device=query.device)
        is_visible = columns < num_chosen[:, None] * self.options.block_size
        scores = scores.masked_fill(~is_visible[:, None], float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)).exp().to(values.dtype)
        with torch.autocast(query.device.type, enabled=False):
            out = weights @ values
        out, lse = (states.unflatten(3, (-1, num_tokens)).movedim(3, 2).flatten(1, 2) for states in (out, lse))
        return out, lse[..., 0]

    # -- Choosing --------------------------------------------------------------------------------

    def choose(self, queries: Tensor, kept: Tensor, begins: range, index: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Choose the blocks of N intervals.

        Args:
            queries: the last ones of the first token of each interval, ``(B, H, N, interval, D)``,
                see `queries`.
            kept: the kept keys ``(B, G, S, D)`` in the frame of the memory.
            begins: first token of each interval.
            index: of the blocks that the last interval sees, see `index_parts`.

        Returns:
            The blocks ``(B, G, N, num_blocks)``, and how many of them are visible, ``(N,)``.
        """
        tokens = torch.arange(begins.start, begins.stop, begins.step, device=queries.device)
        num_evicted = (tokens - self.shape.num_cached).clamp(min=0) // self.options.block_size
        weights = self.weights(queries, kept, num_evicted, index)
        num_chosen = num_evicted.clamp(max=self.options.num_blocks)
        found = weights.topk(min(self.options.num_blocks, weights.shape[-1]), dim=-1).indices
        return F.pad(found, (0, self.options.num_blocks - found.shape[-1])), num_chosen

    def weights(self, queries: Tensor, kept: Tensor, num_evicted: Tensor, index: Iterable[Tensor]) -> Tensor:
        """Return how much the queries attend to each block, ``(B, G, N, blocks)`` in float64.

        A block has the score of its best representative. The kept keys compete with the blocks: a
        query that attends to a sink looks for nothing. Of blocks with equal weight, the newest one
        is preferred, so that rounding does not decide. Blocks that an interval does not see weigh
        -1.

        Args:
            num_evicted: number of blocks that each interval sees, ``(N,)``.
        """
        scores = [grouped_scores(queries, kept[:, :, None])]
        for part in index:  # (B, G, blocks, representatives, D)
            found = grouped_scores(queries, part.flatten(2, 3)[:, :, None])
            scores.append(found.unflatten(-1, part.shape[2:4]).amax(-1))
        joined, num_kept = torch.cat(scores, dim=-1), kept.shape[2]
        is_hidden = torch.arange(-num_kept, joined.shape[-1] - num_kept, device=joined.device) >= num_evicted[:, None]
        joined = joined.masked_fill(is_hidden[:, None], torch.finfo(joined.dtype).min)
        weights = joined.double().softmax(-1)[..., num_kept:].sum(3)
        weights *= 1 + NEWER * torch.arange(weights.shape[-1], device=weights.device)
        return weights.masked_fill(is_hidden[:, num_kept:], -1)

    def readable_blocks(self) -> list[Tensor]:
        """Return keys, values and index of all blocks if kernels can choose, else nothing."""
        device = self.keys.device
        if not kernels.is_available or device.type != "cuda" or self.encoding.start:
            return []
        buffers = [self.blocks.whole_from(name, device) for name in self.blocks.BUFFERS]
        states = self.queries, self.keys, self.values, *buffers
        has_one_type = {each.dtype for each in states} == {self.queries.dtype} != {torch.float64}
        is_readable = all(each.is_cuda for each in states) and self.keys.shape == self.values.shape
        return buffers if has_one_type and is_readable else []

    def num_scores(self, buffers: list[Tensor]) -> int:
        """Return how many numbers the kernels need to choose from `readable_blocks`."""
        return kernels.BlockChoice.num_scores(buffers[0], self.queries.shape[1] * self.options.interval)

    def choose_from(self, buffers: list[Tensor], scores: Tensor) -> None:
        """Let kernels choose from `readable_blocks`.

        Args:
            scores: `num_scores` numbers or more.
        """
        if self.choice is None:
            num_rows = self.keys.shape[:2].numel() * self.options.num_blocks
            self.choice = kernels.BlockChoice(num_rows, self.keys.device)
        self.choice.read_from(buffers, scores)

    def choose_for_token(
        self,
        query: Tensor,
        kept_keys: Tensor,
        num_seen: Tensor,
        base: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        num_chosen: Tensor,
        scaling: float,
        has_positions: bool,
    ) -> None:
        """Choose the blocks of the interval that begins with a token, and copy them to the device.

        Args:
            query: ``(B, H, 1, D)``.
            queries, keys, values, num_chosen: those of this memory, or the copies that a compiled
                graph has in their place.
        """
        shape, options = self.shape, self.options
        if self.choice is not None:
            self.choice(
                *(query[:, :, 0], kept_keys, queries, keys, values, num_chosen, num_seen, base),
                shape=shape,
                encoding=self.encoding,
                block_size=options.block_size,
                representative_size=options.representative_size,
                has_positions=has_positions,
                scaling=scaling,
                newer=NEWER,
            )
            return
        if has_positions:
            steps = (shape.window + options.block_size - (num_seen - base))[:, None]
            query = self.encoding.turn(query, self.encoding.phases(steps, like=query))
        token = int(num_seen[0])
        last = torch.cat((queries[:, :, self.rows_before(token)[1:]], query * scaling), dim=2)[:, :, None]
        kept = self.turned_kept(kept_keys[:, :, : shape.num_kept], has_positions)
        index = index_parts(self.blocks, self.num_evicted(token), query.device)
        chosen, num_visible = self.choose(last, kept, range(token, token + 1), index)
        new_keys, new_values = self.blocks.gather(chosen)
        for state, new in ((keys, new_keys[:, :, 0]), (values, new_values[:, :, 0]), (num_chosen, num_visible[0])):
            state.copy_(new)

    def turned_kept(self, kept: Tensor, has_positions: bool) -> Tensor:
        """Turn kept keys ``(B, G, S, D)`` of a layer to the frame of the memory."""
        if kept.shape[2] == 0 or not has_positions:
            return kept
        # A query, which has the phase W + block_size, sees kept key i at the distance S + W - i.
        shift = torch.full((1, 1), self.options.block_size - self.shape.num_kept, device=kept.device)
        return self.encoding.turn(kept, self.encoding.phases(shift, like=kept))

    def keep(self, keys: Tensor, values: Tensor, num_chosen: Tensor) -> None:
        """Keep the keys and values ``(B, G, K, D)`` of the chosen blocks until the next choice."""
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.num_chosen.copy_(num_chosen)

    def num_evicted(self, token: int) -> int:
        """Return how many blocks have left the window of a token."""
        return max(0, token - self.shape.num_cached) // self.options.block_size

    def queries_before(self, token: int) -> Tensor:
        """Return the stored queries ``(B, H, interval, D)`` of the tokens before a token."""
        return self.queries[:, :, self.rows_before(token)]

    def rows_before(self, token: int) -> Tensor:
        return self.row_of(torch.arange(token - self.options.interval, token, device=self.queries.device))

    def row_of(self, tokens: Tensor) -> Tensor:
        return tokens.remainder(self.options.interval + 1)

    # -- Storing ---------------------------------------------------------------------------------

    @property
    def num_stored(self) -> int:
        """Number of tokens after the kept ones that are in blocks."""
        return len(self.blocks) * self.options.block_size

    def whole_blocks(self, num_tokens: int) -> int:
        """Return how many of consecutive tokens fill whole blocks."""
        return max(0, num_tokens) // self.options.block_size * self.options.block_size

    def num_complete(self, num_seen: int) -> int:
        """Return how many tokens are in complete blocks that are not stored yet."""
        return self.whole_blocks(num_seen - self.shape.num_kept - self.num_stored)

    def complete_tokens(self, num_seen: int) -> Tensor:
        """Return the tokens that `num_complete` counts, ``(T,)``."""
        start = self.shape.num_kept + self.num_stored
        return torch.arange(start, start + self.num_complete(num_seen), device=self.queries.device)

    def store_chunk(self, layer: StreamingLayer, step: "ChunkStep", key: Tensor, value: Tensor) -> None:
        """Store the blocks that are complete with a chunk's keys and values ``(B, G, T, D)``."""
        first, end = step.first, step.first + step.num_inputs
        if not self.num_complete(end):
            return
        tokens = self.complete_tokens(end)
        before, new = tokens[tokens < first], tokens[tokens >= first] - first
        slots = self.shape.slot_of(before)[None]
        keys = torch.cat((gather_columns(layer.keys, slots), key[:, :, new]), dim=2)
        values = torch.cat((gather_columns(layer.values, slots), value[:, :, new]), dim=2)
        self.blocks.append(*self.as_blocks(layer, keys, values, tokens, step.base))

    def as_blocks(
        self, layer: StreamingLayer, keys: Tensor, values: Tensor, tokens: Tensor, base: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens as blocks ``(B, G, N, block_size, D)`` in the frame of the memory.

        Args:
            keys: ``(B, G, T, D)``, with the phases ``tokens - base``. Rows may be those of several
                layers.
            tokens: ``(T,)``, consecutive.
        """
        if layer.has_positions:
            in_block = (tokens - self.shape.num_kept).remainder(self.options.block_size)
            keys = self.encoding.turn(
                keys, self.encoding.phases((in_block - tokens + base[:1].to(tokens.device))[None], like=keys)
            )
        size = self.options.block_size
        return keys.unflatten(2, (-1, size)), values.unflatten(2, (-1, size))

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
            self.choice = None

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def free(self) -> None:
        super().free()
        self.choice = None
        self.blocks = HostBlocks(self.options.representative_size)

    def map_rows(self, rows: Tensor) -> None:
        """Replace row i of the batch by row ``rows[i]``; the batch size may change."""
        if self.is_allocated and rows.tolist() == list(range(len(self.queries))):
            return
        self.blocks.map_rows(rows)
        if self.is_allocated and len(rows) != len(self.queries):
            self.choice = None  # a captured graph needs that of as many rows
        for name, buffer in self.buffers.items():
            if name != "num_chosen":
                setattr(self, name, select_rows(buffer, rows))

    def __deepcopy__(self, memo: dict) -> "LayerMemory":
        twin = LayerMemory(self.options, self.shape, self.encoding)
        if self.is_allocated:
            twin.set_buffers(self.buffers)
            twin.blocks = self.blocks.shared()
        return twin


@custom_op("sinklm::choose_blocks", mutates_args=("queries", "keys", "values", "num_chosen"))
def choose_blocks(
    query: Tensor,
    kept_keys: Tensor,
    num_seen: Tensor,
    base: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    num_chosen: Tensor,
    chooses: Tensor,
    number: Tensor,
    scaling: float,
    has_positions: bool,
) -> None:
    """Let a memory choose its blocks if it ``chooses``: see `LayerMemory.choose_for_token`.

    This is one operator of a graph, since the shapes of its states depend on the stream's length.

    Args:
        number: of the memory. As a tensor, it is no constant of the graph.
    """
    if chooses:
        states = query, kept_keys, num_seen, base, queries, keys, values, num_chosen
        MEMORIES[int(number)].choose_for_token(*states, scaling, has_positions)


@choose_blocks.register_fake
def _(*args: object) -> None:
    return None
