"""StreamingLLM for transformers: a cache of constant size, and the equivalent banded attention.

Suggested reading order: `rule` (the streaming rule as arithmetic), `encodings` (how phases are
moved), `layers` (layers that differ), `steps` (one forward pass), `streams` (the state between
passes), `cache` and `steering` (how models of transformers use it), `families` (which models are
supported), `quantized`, `memory`, `saving`, and `record` and `continuing` (what a cache has read).
`testing` checks a model against the rule.
"""

from .adapters import Adapter
from .cache import StreamingCache
from .chat import Chat
from .decoding import StreamingDecoder
from .encodings import Alibi, Rotary
from .families import register_family, shared_rotary
from .generation import Generator, TextStream, default_cache
from .memory import MemoryOptions
from .sampling import Sampling
from .scoring import stream_logits, stream_losses

__all__ = [
    "Adapter",
    "Alibi",
    "Chat",
    "Generator",
    "MemoryOptions",
    "Rotary",
    "Sampling",
    "StreamingCache",
    "StreamingDecoder",
    "TextStream",
    "default_cache",
    "register_family",
    "shared_rotary",
    "stream_logits",
    "stream_losses",
]
