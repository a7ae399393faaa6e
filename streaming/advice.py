"""What to do instead, for mistakes in creating a `StreamingCache`."""

import os
import warnings
from typing import Any

from torch import nn

from .rule import StreamShape
from .wrappers import decoder_of


def refuse_constructor(arguments: tuple[Any, ...]) -> None:
    """Raise a TypeError if the constructor was called in place of ``for_model``."""
    if len(arguments) < 2 or not isinstance(arguments[1], StreamShape):
        raise TypeError(
            "a StreamingCache is not created by its constructor: use StreamingCache.for_model(model, num_kept=4, "
            "window=1020)"
        )


def refuse_name(model: object) -> None:
    """Raise a TypeError if ``model`` is the name or path of a model."""
    if isinstance(model, str | os.PathLike):
        raise TypeError(
            f"StreamingCache.for_model takes a loaded model and not its name: pass sinklm.load_model({str(model)!r})"
        )


def refuse_without_weights(decoder: nn.Module) -> None:
    """Raise a ValueError if weights are missing, and were not offloaded by accelerate either."""
    if any(
        parameter.is_meta and not hasattr(module, "_hf_hook")
        for module in decoder.modules()
        for parameter in module.parameters(recurse=False)
    ):
        raise ValueError("the model has weights on the device meta, which stores none: load them first")


def warn_if_untrained(model: Any, shape: StreamShape, largest_distance: int) -> None:
    """Warn if a cache of a given shape has distances that the model was not trained on."""
    trained = getattr(decoder_of(model).config, "max_position_embeddings", None)
    if trained and largest_distance >= trained:
        warnings.warn(
            f"the cache {shape.num_kept}+{shape.window} is too large for the {trained} positions that the model was "
            f"trained on; output quality may degrade. Use a cache of fewer than {trained} tokens in total.",
            stacklevel=3,
        )
