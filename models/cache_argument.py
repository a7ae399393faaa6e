"""The name of the argument that passes a cache to a model.

transformers 5.24 renamed it from ``past_key_values`` to ``cache``, in forward passes, in their outputs and in
`generate`. Our models take both names with every version.
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
        f"transformers {transformers.__version__} passes a cache to a model under a name that this version of sinklm "
        'does not know: pip install "transformers<5.25"'
    )


CACHE = _name()  # of the installed version


def single_cache(cache: Cache | None, past_key_values: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache that a caller passed under either name.

    Args:
        others: the remaining keyword arguments.

    Raises:
        ValueError: there are two caches, or one under an unknown name, which would otherwise be ignored.
    """
    for name, value in others.items():
        if isinstance(value, Cache):
            raise ValueError(f"unknown argument {name} holds a cache: pass it as {' or '.join(NAMES)}")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
    return past_key_values if cache is None else cache
