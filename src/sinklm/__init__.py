"""Pre-training and streaming of language models with learnable sink tokens.

The names below are loaded on first use, so ``import sinklm`` is fast.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import load_model, load_tokenizer
    from .models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
    from .streaming import StreamingCache

__all__ = ["SinkGPTNeoXConfig", "SinkGPTNeoXForCausalLM", "StreamingCache", "load_model", "load_tokenizer"]

_HOMES = {
    "SinkGPTNeoXConfig": ".models",
    "SinkGPTNeoXForCausalLM": ".models",
    "StreamingCache": ".streaming",
    "load_model": ".checkpoints",
    "load_tokenizer": ".checkpoints",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("sinklm")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
