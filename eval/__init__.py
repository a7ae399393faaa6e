"""Zero-shot tasks, perplexity on long text, StreamEval, attention sinks, decoding speed."""

from ..extras import require_extra

require_extra("eval")
