"""The streaming rule: which keys a query sees, at which distance, and in which slots they are.

With S kept tokens and a window of W, the query of token t (counted from 0) sees the tokens
``0 … min(S, t) - 1`` and ``max(S, t - W) … t``. Distances are distances within the cache: the query
has position ``min(t, S + W)``, kept token i has position i, and a token of the window has its true
distance to the query. (Xiao et al. 2024, section 3.2 and its code: forward first, evict after.)

The cache has S + W + 1 slots. Token t is in slot t while the cache fills. Afterwards the last W + 1
slots are a ring, in which a new token overwrites the one that has just left the window.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # tokens in a cache


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """Return a value as an integer, also one of numpy. Raises a ValueError if it is none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {at_least}")
    return number


@dataclass(frozen=True)
class StreamShape:
    """Shape of a stream: S kept tokens and a window of W tokens before the current one."""

    num_kept: int
    window: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_kept", whole_number("num_kept", self.num_kept, at_least=0))
        object.__setattr__(self, "window", whole_number("window", self.window, at_least=1))
        if self.num_cached > LARGEST:
            raise ValueError(f"a cache of {self} tokens is too large: use at most {LARGEST:,}")

    def __str__(self) -> str:
        return f"{self.num_kept}+{self.window}"

    @property
    def num_cached(self) -> int:
        """Tokens in the cache after each step; also the position of all queries of a full cache."""
        return self.num_kept + self.window

    @property
    def num_slots(self) -> int:
        """Maximum number of keys that a query sees: the cached tokens and its own."""
        return self.num_cached + 1

    def query_position(self, tokens: Tensor) -> Tensor:
        """Return the position within the cache of each token's query."""
        return tokens.clamp(max=self.num_cached)

    def slot_of(self, tokens: Tensor) -> Tensor:
        """Return the slot in which each token is stored."""
        ring = self.num_kept + (tokens - self.num_kept).remainder(self.window + 1)
        return torch.where(tokens < self.num_kept, tokens, ring)

    def tokens_in_slots(self, num_seen: Tensor) -> Tensor:
        """Return the token in each slot ``(B, slots)`` after ``num_seen`` ``(B,)`` tokens.

        Empty slots are -1.
        """
        slots = torch.arange(self.num_slots, device=num_seen.device)
        seen = num_seen[:, None]
        laps = (seen - 1 - slots).div(self.window + 1, rounding_mode="floor")
        newest = torch.where(slots < self.num_kept, slots, slots + laps * (self.window + 1))
        return torch.where(slots < seen, newest, -1)
