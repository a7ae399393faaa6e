"""Pre-training with DeepSpeed: configuration, engine, loop, checkpoints, metrics."""

from ..extras import require_extra

require_extra("train")
