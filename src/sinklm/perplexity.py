"""The perplexity of a loss."""

import math

MOST_NATS = 700.0  # float64 is infinite from 710, which JSON does not have


def perplexity_of(loss: float) -> float:
    """Return e to the power of a mean loss in nats; that of `MOST_NATS` for larger ones."""
    return math.exp(min(loss, MOST_NATS))
