"""What to do instead, for mistakes in creating a `StreamingCache`."""

import warnings
from typing import Any

from torch import nn

from ..models.config import trained_windows
from .layers import former_shape
from .rule import StreamShape
from .wrappers import decoder_of


def refuse_constructor(arguments: tuple[Any, ...]) -> None:
    """Raise a TypeError if the constructor was called in place of ``for_model``."""
    if len(arguments) < 2 or not isinstance(arguments[1], StreamShape):
        raise TypeError(
            "a StreamingCache is not created by its constructor: use StreamingCache.for_model(model, num_kept=4, "
            "window=1020)"
        )


def refuse_without_weights(decoder: nn.Module) -> None:
    """Raise a ValueError if weights are missing, and were not offloaded by accelerate either."""
    if any(
        parameter.is_meta and not hasattr(module, "_hf_hook")
        for module in decoder.modules()
        for parameter in module.parameters(recurse=False)
    ):
        raise ValueError("the model has weights on the device meta, which stores none: load them first")


def warn_if_untrained(model: Any, shape: StreamShape, num_cached: int, block_size: int) -> None:
    """Warn if a cache of a given shape shows the layers what they were not trained on.

    It has longer distances, in the cache or to a block of a memory, more tokens than the windows
    before an export with full attention, or fewer kept tokens than the windowed layers.
    """
    config = decoder_of(model).config
    trained = getattr(config, "max_position_embeddings", None)
    num_more = max(0, block_size - shape.num_kept)  # positions of a block, which stands before the window
    if trained and num_cached + num_more >= trained:
        block = f" with blocks of {block_size} tokens" if block_size else ""
        warnings.warn(
            f"the cache {shape}{block} is too large for the {trained} positions that the model was trained on; output "
            f"quality may degrade. Use a cache of fewer than {trained - num_more} tokens in total.",
            stacklevel=3,
        )
    former = former_shape(config)
    if former is not None and shape.num_cached > former.num_cached:
        warnings.warn(
            f"the cache {shape} is too large for the windows {former} that the model was trained with; output quality "
            f"may degrade. Use the cache {former}.",
            stacklevel=3,
        )
    num_kept = trained_windows(config).get("num_kept") or 0
    if shape.num_kept < num_kept:
        warnings.warn(
            f"the windowed layers were trained with {num_kept} kept token{'s' * (num_kept > 1)}, and this cache keeps "
            f"{shape.num_kept}: use num_kept={num_kept} or more",
            stacklevel=3,
        )
