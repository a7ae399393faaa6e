"""The Pythia-style model with a sink, its streaming cache, and export."""

from ..versions import warn_if_untested
from .config import SinkGPTNeoXConfig, tokens_per_sample
from .loading import load_model, load_tokenizer
from .modeling import SinkGPTNeoXForCausalLM
from .streaming import StreamingCache

warn_if_untested("torch", "transformers")

__all__ = [
    "SinkGPTNeoXConfig",
    "SinkGPTNeoXForCausalLM",
    "StreamingCache",
    "load_model",
    "load_tokenizer",
    "tokens_per_sample",
]
