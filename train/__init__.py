"""Pre-training with DeepSpeed: settings, engine, loop, checkpoints, metrics."""

from ..extras import require_extra

require_extra("train")
