"""Pythia-style model with an attention sink: configuration, layers, loss and training kernels."""

from ..versions import warn_if_untested
from .carried import CarriedKeys
from .config import SinkGPTNeoXConfig, tokens_per_sample
from .modeling import SinkGPTNeoXForCausalLM

warn_if_untested("torch", "transformers")

__all__ = ["CarriedKeys", "SinkGPTNeoXConfig", "SinkGPTNeoXForCausalLM", "tokens_per_sample"]
