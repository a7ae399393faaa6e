"""StreamingLLM for today's transformers: a cache of constant size, and the banded attention that equals it.

Read in this order: `rule` (the rule as arithmetic), `encodings` (how phases are moved), `steps` (what one forward
pass does with both), `cache` and `steering` (how transformers' models come to use it), `families` (which models can).
"""

from .cache import StreamingCache
from .chat import Chat
from .decoding import StreamingDecoder
from .generation import Generator, TextStream, default_cache
from .scoring import stream_logits, stream_losses

__all__ = [
    "Chat",
    "Generator",
    "StreamingCache",
    "StreamingDecoder",
    "TextStream",
    "default_cache",
    "stream_logits",
    "stream_losses",
]
