"""StreamingLLM for today's transformers: a constant-memory cache and the banded attention that equals it."""

from .cache import StreamingCache

__all__ = ["StreamingCache"]
