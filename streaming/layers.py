"""Which keys each layer of a model keeps, and how it encodes positions.

Layers can differ: in hybrid models some layers see the whole cache and others a window of their
own, sometimes with another rotary base. Layers with the same shape and encoding are a group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .encodings import Encoding, Rotary
from .rule import StreamShape


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same shape and position encoding."""

    shape: StreamShape
    encoding: Encoding


class LayerPlan:
    """The groups of a model's layers in a cache of a given shape.

    Attributes:
        groups: in the order of their first layers.
        group_of_layer: index of each layer's group.
        num_slots, window: the largest of all groups.
        num_slots_of_smallest: the smallest of all groups.
    """

    def __init__(self, groups_by_layer: Sequence[LayerGroup], shape: StreamShape):
        self.groups = list(dict.fromkeys(groups_by_layer))
        self.group_of_layer = tuple(self.groups.index(group) for group in groups_by_layer)
        self.shape = shape
        self.num_layers = len(groups_by_layer)
        self.num_slots = max(group.shape.num_slots for group in self.groups)
        self.num_slots_of_smallest = min(group.shape.num_slots for group in self.groups)
        self.window = max(group.shape.window for group in self.groups)

    @classmethod
    def of(
        cls, decoder: Any, shape: StreamShape, encoding: Callable[[Any, StreamShape], Encoding | Sequence[Encoding]]
    ) -> "LayerPlan":
        """Return the plan of a decoder.

        Args:
            encoding: as in `families.Family`.
        """
        shapes = layer_shapes(decoder.config, shape)
        found = encoding(decoder, shape)
        encodings = [found] * len(shapes) if isinstance(found, Encoding) else found
        return cls([LayerGroup(*pair) for pair in zip(shapes, encodings, strict=True)], shape)

    def group(self, layer_idx: int) -> LayerGroup:
        return self.groups[self.group_of_layer[layer_idx]]

    def has_positions(self, layer_idx: int) -> bool:
        encoding = self.group(layer_idx).encoding
        return not isinstance(encoding, Rotary) or encoding.rotates(layer_idx)

    def __str__(self) -> str:
        """The size of the cache: "4+1020", or "4+1020 (20 of 24 layers 0+511)"."""
        own = ", ".join(self.own_shapes)
        return f"{self.shape} ({own})" if own else str(self.shape)

    @property
    def own_shapes(self) -> list[str]:
        """Which layers have a smaller shape than the cache."""
        counts = Counter(self.groups[group].shape for group in self.group_of_layer)
        return [f"{n} of {self.num_layers} layers {shape}" for shape, n in counts.items() if shape != self.shape]


def layer_shapes(config: PreTrainedConfig, shape: StreamShape) -> list[StreamShape]:
    """Return the shape of each layer of a model in a cache of a given shape.

    - A layer without a window has the shape of the cache.
    - A windowed layer of a model of sinklm keeps and sees at most what it was trained with.
    - A windowed layer of another model keeps no tokens and has its own window, or that of the cache
      if it is smaller. If its window covers the whole cache, it has the shape of the cache.

    Raises:
        ValueError: a layer sees only the token itself, which is no stream.
    """
    trained = getattr(config, "layer_windows", None)
    if trained is not None:
        num_kept = min(shape.num_kept, config.num_kept)
        return [shape if own is None else StreamShape(num_kept, min(shape.window, own)) for own in trained]
    return [shape if keys is None else windowed_shape(keys, shape) for keys in own_windows(config)]


def windowed_shape(num_keys: int, shape: StreamShape) -> StreamShape:
    """Return the shape of a layer that shows ``num_keys`` keys to a query, with its own key."""
    if num_keys >= shape.num_slots:
        return shape
    if num_keys < 2:
        raise ValueError(
            f"the model's config has sliding_window {num_keys}, which shows a token only itself: set it to 2 or more"
        )
    return StreamShape(0, min(shape.window, num_keys - 1))


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer in keys, with the query's own; None without one."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [window] * config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]
