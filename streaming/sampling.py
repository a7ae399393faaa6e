"""Sampling of the next token, with the logits processors of transformers."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

MAX_PENALTY = 1000  # and its inverse is the lowest; scores overflow with much larger ones
# The first equals greedy decoding, the second a random choice. Scores divided by a lower one
# overflow, and divided by a higher one those of excluded tokens become NaN.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The names and meanings are those of transformers' ``generate``.

    Args:
        temperature: 0 always chooses the most likely token.
        top_k: choose among the ``top_k`` most likely tokens; None: among all.
        top_p: choose among the most likely tokens with a total probability of ``top_p``.
        min_p: choose among tokens of at least ``min_p`` times the highest probability.
        repetition_penalty: above 1 makes tokens less likely that the text already has.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it must be a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1, or None to sample among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be greater than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be from 0 to 1")
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: it must be from {1 / MAX_PENALTY} to {MAX_PENALTY}"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def _divisor(self) -> float:
        return min(max(float(self.temperature), MIN_TEMPERATURE), MAX_TEMPERATURE)

    def processors(self) -> LogitsProcessorList:
        """Return the processors in the order of ``generate``. Only the first may read the ids."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(penalty=float(self.repetition_penalty)))
        if self.is_greedy:
            return found
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(self._divisor))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p > 0:
            found.append(MinPLogitsWarper(float(self.min_p)))
        return found

    def generate_arguments(self) -> dict[str, Any]:
        """Return these settings as arguments of ``model.generate``.

        Other settings, such as beams or stop strings, are those of the model's generation config.
        """
        arguments: dict[str, Any] = {"do_sample": not self.is_greedy, "repetition_penalty": self.repetition_penalty}
        if not self.is_greedy:
            arguments |= {"temperature": self._divisor, "top_k": self.top_k or 0}
            arguments |= {"top_p": self.top_p, "min_p": self.min_p}
        return arguments
