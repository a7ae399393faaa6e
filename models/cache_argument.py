"""The name of the argument that passes a cache to a model.

transformers 5.24 renamed it from ``past_key_values`` to ``cache``, in forward passes, in their
outputs and in `generate`. Models of sinklm accept both names with every version.
"""

import inspect
from typing import Any

import transformers
from transformers import Cache, GPTNeoXModel

NAMES = ("cache", "past_key_values")


def _name() -> str:
    parameters = inspect.signature(GPTNeoXModel.forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise ImportError(
        f"transformers {transformers.__version__} is not supported: its GPT-NeoX has no argument named "
        f'{" or ".join(NAMES)}; run: pip install "transformers<5.25"'
    )


CACHE = _name()  # the name in the installed version of transformers


def single_cache(cache: Cache | None, past_key_values: Cache | None, others: dict[str, Any]) -> Cache | None:
    """Return the cache that was passed under either name.

    Args:
        others: the remaining keyword arguments.

    Raises:
        ValueError: two caches were passed, or one under an unknown name, which would otherwise be
            ignored.
    """
    for name, value in others.items():
        if isinstance(value, Cache):
            raise ValueError(f"a cache was passed as the unknown argument {name}: pass it as {' or '.join(NAMES)}")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "cache and past_key_values are two names of the same argument: pass only one of them (`generate` of "
            f"transformers {transformers.__version__} takes {CACHE})"
        )
    return past_key_values if cache is None else cache
