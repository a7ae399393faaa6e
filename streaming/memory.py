"""Memory beyond the window: blocks of evicted tokens that come back when queries look for them.

The tokens of a stream are divided into blocks. When a block is complete, its keys and values are
copied to host memory, and a few representative keys to an index. At the first token of every
interval, each head of keys chooses the blocks to which the last queries attend most, that of this
token included, and these are copied back. The queries of the interval see them in addition to the
cache. (InfLLM, Xiao et al. 2024, arXiv 2402.04617, is the idea.)

Every chosen block stands immediately before the window: its tokens have the distances
``W + 1 … W + block_size`` to each query. So distances never exceed that, or ``S + W``, however long
the stream is. A choice depends on no later token, so passes of any length have the same
result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buffers import StreamingLayer, gather_columns, static_zeros
from .encodings import Rotary
from .layer_memory import LayerMemory, host_number
from .layers import LayerPlan
from .memory_blocks import append_to
from .rule import StreamShape, whole_number

if TYPE_CHECKING:
    from .counters import StreamCounters

DEFAULT_INTERVAL, DEFAULT_REPRESENTATIVE_SIZE = 8, 4


@dataclass(frozen=True)
class MemoryOptions:
    """Size of a memory beyond the window.

    Args:
        block_size: tokens in a block.
        num_blocks: maximum number of blocks that each head of keys sees at a time.
        interval: tokens from one choice of blocks to the next.
        representative_size: consecutive keys of a block whose mean is in the index. The smaller,
            the better blocks are found, and the larger is the index, which is read for each choice.

    Raises:
        ValueError: a value is no number of at least 1, ``representative_size`` does not
            divide ``block_size``, or ``interval`` exceeds it.
    """

    block_size: int = 64
    num_blocks: int = 8
    interval: int = DEFAULT_INTERVAL
    representative_size: int = DEFAULT_REPRESENTATIVE_SIZE

    def __str__(self) -> str:
        """The number and size of the blocks, and what differs from the defaults: "8x64"."""
        defaults = {"interval": DEFAULT_INTERVAL, "representative_size": DEFAULT_REPRESENTATIVE_SIZE}
        others = [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return " ".join([f"{self.num_blocks}x{self.block_size}", *others])

    @property
    def num_representatives(self) -> int:
        """Number of means of a block's keys in the index."""
        return self.block_size // self.representative_size

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            object.__setattr__(self, name, whole_number(f"{name} of the memory", value, at_least=1))
        if self.block_size % self.representative_size:
            raise ValueError(
                f"representative_size of the memory is {self.representative_size}: it must divide the block_size of "
                f"{self.block_size}"
            )
        if self.interval > self.block_size:
            raise ValueError(
                f"interval of the memory is {self.interval}: it must be at most the block_size of {self.block_size}"
            )


class StreamMemory:
    """The memories of a cache's layers.

    A layer with a window of its own has one only if that window covers the blocks.

    Attributes:
        num_seen: tokens that were seen, None if only the counters on the device know.
        chooses: see `LayerMemory`.
    """

    def __init__(self, options: MemoryOptions, layers: Sequence[StreamingLayer]):
        self.options = options
        self.layers = [(layer, layer.memory) for layer in layers if layer.memory is not None]
        self.num_seen: int | None = None
        self.chooses = host_number(torch.bool)
        self.scores: dict[torch.device, Tensor] = {}  # of the kernels that choose; all layers use them
        for _, memory in self.layers:
            memory.chooses = self.chooses

    @classmethod
    def of(
        cls,
        options: MemoryOptions,
        plan: LayerPlan,
        rules: Sequence[StreamShape | None],
        layers: Sequence[StreamingLayer],
    ) -> "StreamMemory":
        """Give the layers of a new cache a memory.

        Args:
            rules: the window of each layer of the model, see `layers.own_rules`.

        Raises:
            ValueError: the model has no rotary positions, or all its layers have smaller windows of
                their own, or a block is longer than the window.
        """
        if options.block_size > plan.shape.window:
            raise ValueError(
                f"the memory's block_size is {options.block_size}: it must be at most the window of {plan.shape.window}"
            )
        largest_distance = plan.shape.window + options.block_size
        for index, (layer, rule) in enumerate(zip(layers, rules, strict=True)):
            shape, encoding = plan.group(index).shape, plan.group(index).encoding
            if not isinstance(encoding, Rotary):
                raise ValueError("a memory requires rotary positions, and this model has ALiBi: use none")
            if shape == plan.shape and (rule is None or rule.window >= largest_distance):
                layer.memory = LayerMemory(options, shape, encoding)
        memory = cls(options, layers)
        if not memory.layers:
            raise ValueError(
                f"a memory would have no effect: no layer sees as far as {largest_distance} tokens, the window and a "
                "block. Use a smaller window and smaller blocks, or no memory"
            )
        return memory

    @torch.no_grad()
    def before_pass(self, counters: "StreamCounters | None", num_inputs: int) -> None:
        """Store complete blocks, and say whether a pass over one token begins an interval."""
        self.chooses.fill_(False)
        if counters is None:
            self.num_seen = num_inputs
            return
        first = int(counters.num_seen[0]) if self.num_seen is None else self.num_seen
        self.num_seen = None  # if this is interrupted
        if any(memory.num_complete(first) for _, memory in self.layers):
            for layers in self.alike():
                self.store_complete(layers, first, counters.base)
        if num_inputs == 1 and first % self.options.interval == 0 and self.layers[0][1].num_evicted(first):
            self.prepare_kernels()
            self.chooses.fill_(True)
        self.num_seen = first + num_inputs

    def prepare_kernels(self) -> None:
        """Tell the kernels that choose where the blocks are, and where there is room for scores."""
        readable = [(memory, buffers) for _, memory in self.layers if (buffers := memory.readable_blocks())]
        for memory, buffers in readable:
            device, size = memory.keys.device, memory.num_scores(buffers)
            if device not in self.scores or len(self.scores[device]) < size:
                self.scores[device] = static_zeros((size,), torch.float32, device)
        for memory, buffers in readable:
            memory.choose_from(buffers, self.scores[memory.keys.device])

    def alike(self) -> Iterator[list[tuple[StreamingLayer, LayerMemory]]]:
        """Yield layers whose blocks are stored together: their states have one form."""
        groups: dict[Any, list[tuple[StreamingLayer, LayerMemory]]] = {}
        for layer, memory in self.layers:
            states = (memory.queries, memory.keys, memory.values)
            forms = [(each.shape, each.dtype, each.device) for each in states]
            form = (*forms, memory.encoding, layer.has_positions, memory.num_stored)
            groups.setdefault(form, []).append((layer, memory))
        yield from groups.values()

    def store_complete(self, layers: list[tuple[StreamingLayer, LayerMemory]], num_seen: int, base: Tensor) -> None:
        """Store the blocks that are complete after ``num_seen`` tokens, which the layers hold.

        Args:
            layers: from `alike`.
        """
        layer, memory = layers[0]
        if memory.num_complete(num_seen):
            tokens = memory.complete_tokens(num_seen)
            slots = memory.shape.slot_of(tokens)[None]
            keys = torch.cat([gather_columns(layer.keys, slots) for layer, _ in layers])
            values = torch.cat([gather_columns(layer.values, slots) for layer, _ in layers])
            blocks = memory.as_blocks(layer, keys, values, tokens, base)
            append_to([memory.blocks for _, memory in layers], *blocks)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can include the next pass: only kernels choose without the host."""
        return not self.chooses or all(memory.choice is not None for _, memory in self.layers)

    @property
    def num_bytes(self) -> int:
        """Memory on the devices for scores, which grows with the stream."""
        return sum(scores.nbytes for scores in self.scores.values())

    def crop(self, num_seen: int) -> None:
        """Remove the blocks that are not complete after ``num_seen`` tokens."""
        self.num_seen = None
        for _, memory in self.layers:
            memory.blocks.truncate(max(0, num_seen - memory.shape.num_kept) // self.options.block_size)

    @property
    def num_host_bytes(self) -> int:
        return sum(memory.blocks.num_bytes for _, memory in self.layers)
