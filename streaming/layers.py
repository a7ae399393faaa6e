"""Which keys each layer of a model keeps, and how it encodes positions.

Layers can differ: in hybrid models some layers see the whole cache and others a window of their
own, sometimes with another rotary base. Layers with the same shape and encoding are a group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from ..models.config import trained_windows
from .encodings import Encoding, Rotary
from .rule import StreamShape

KNOWN_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}  # in `config.layer_types`


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

        Raises:
            ValueError: it returned something else than encodings, or not one for each layer.
        """
        shapes = layer_shapes(decoder.config, shape)
        found = encoding(decoder, shape)
        encodings = [found] * len(shapes) if isinstance(found, Encoding) else found
        if not _is_for_each(encodings, len(shapes)):
            raise ValueError(
                f"the encoding registered for model type {decoder.config.model_type!r} returned {encodings!r}: return "
                f"Rotary or Alibi, or a list with one for each of the {len(shapes)} layers"
            )
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


def _is_for_each(encodings: Any, num_layers: int) -> bool:
    is_list = isinstance(encodings, Sequence) and len(encodings) == num_layers
    return is_list and all(isinstance(each, Encoding) for each in encodings)


def layer_shapes(config: PreTrainedConfig, shape: StreamShape) -> list[StreamShape]:
    """Return the shape of each layer of a model in a cache of a given shape.

    - A layer without a window has the shape of the cache.
    - A windowed layer of a model of sinklm keeps and sees at most what it was trained with.
    - A windowed layer of another model has the shape of the cache if its window covers it.
      Otherwise it keeps no tokens, and has the smaller of both windows.

    Raises:
        ValueError: a window shows a token only itself, or a layer is of an unknown type.
    """
    if unknown := set(known_setting(config, "layer_types") or ()) - KNOWN_TYPES:
        raise ValueError(
            f"the model has layers of type {min(unknown)!r}, which were not tested with a cache. Supported are "
            f"{', '.join(sorted(KNOWN_TYPES))}"
        )
    return [shape if rule is None else limited(shape, rule, is_stock=not is_ours(config)) for rule in own_rules(config)]


def limited(shape: StreamShape, rule: StreamShape, *, is_stock: bool) -> StreamShape:
    """Return the shape of a windowed layer in a cache of a given shape."""
    if is_stock and shape.num_cached <= rule.window:
        return shape
    return StreamShape(min(shape.num_kept, rule.num_kept), min(shape.window, rule.window))


def own_rules(config: PreTrainedConfig) -> list[StreamShape | None]:
    """Return the rule of each layer of a model, which holds without a cache; None for no window.

    Raises:
        ValueError: a window shows a token only itself.
    """
    if is_ours(config):
        return [None if window is None else StreamShape(config.num_kept, window) for window in config.layer_windows]
    num_keys, num_layers = known_setting(config, "sliding_window"), config.num_hidden_layers
    types = known_setting(config, "layer_types") or ["sliding_attention"] * num_layers
    if num_keys is None or "sliding_attention" not in types:
        return [None] * num_layers
    if num_keys < 2:
        raise ValueError(f"the model's own sliding_window is {num_keys}, and its windowed layers see no other token")
    rule = StreamShape(0, num_keys - 1)  # `sliding_window` counts the query's own key
    return [rule if layer_type == "sliding_attention" else None for layer_type in types]


def known_setting(config: PreTrainedConfig, name: str) -> Any:
    """Return a setting, None if configs of this class do not have it by default.

    A config keeps settings that its model ignores: a window of a Llama that was a Mistral before,
    or the types of layers of a Mistral, which are all alike.
    """
    return getattr(config, name, None) if name in default_settings(config.__class__) else None


@cache
def default_settings(config_class: Callable[[], PreTrainedConfig]) -> set[str]:
    return set(dir(config_class()))


def describe_rules(config: PreTrainedConfig) -> str | None:
    """Return which layers have windows of their own: "20 of 24 layers 0+511"; None if none has."""
    return _counted(own_rules(config))


def former_rules(config: PreTrainedConfig) -> list[StreamShape | None]:
    """Return the rule that each layer of an export with full attention was trained with.

    None for a layer without a window. The list is empty for all other models. A window that was
    drawn for each step counts as the largest one.
    """
    windows = {} if is_ours(config) else trained_windows(config)
    if not windows:
        return []
    kept = windows["num_kept"]
    return [None if window is None else StreamShape(kept, window) for window in windows["layer_windows"]]


def former_shape(config: PreTrainedConfig) -> StreamShape | None:
    """Return the stream that all layers of an export with full attention were trained with.

    None if the model has no record of windows, or if its layers had different ones.
    """
    rules = set(former_rules(config))
    return rules.pop() if len(rules) == 1 else None


def describe_former_rules(config: PreTrainedConfig) -> str | None:
    """Return the windows before an export with full attention: "1+63", "2 of 4 layers 1+63"."""
    shape = former_shape(config)
    return str(shape) if shape is not None else _counted(former_rules(config))


def _counted(rules: Sequence[StreamShape | None]) -> str | None:
    counts = Counter(rule for rule in rules if rule is not None)
    return ", ".join(f"{number} of {len(rules)} layers {rule}" for rule, number in counts.items()) or None


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a model has windowed layers of sinklm."""
    return known_setting(config, "layer_windows") is not None
