"""The streaming rule as arithmetic: what a query sees, how far away, and which slot of the cache holds it.

With S kept tokens and a window of W, the query of token t (counted from 0) sees the tokens ``0 … min(S, t) - 1`` and
``max(S, t - W) … t``. Distances are distances within the cache: the query stands at position ``min(t, S + W)``, kept
token i at position i, and a token of the window at its true distance before the query. (Xiao et al. 2024, section 3.2
and its code: forward first, evict after.)

The cache has S + W + 1 slots. Token t lies in slot t while the cache fills; from then on the last W + 1 slots are a
ring, where a new token takes the place of the one that has just left the window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamShape:
    """S kept tokens and a window of W recent ones, besides the token that asks."""

    num_kept: int
    window: int

    def __post_init__(self) -> None:
        if self.num_kept < 0:
            raise ValueError(f"num_kept is {self.num_kept}: it counts kept initial tokens and cannot be negative")
        if self.window < 1:
            raise ValueError(f"window is {self.window}: a stream needs at least one recent token (window >= 1)")

    @property
    def num_cached(self) -> int:
        """Tokens that remain after each step; the position in the cache at which every later query stands."""
        return self.num_kept + self.window

    @property
    def num_slots(self) -> int:
        """Keys a query sees at most: the cached tokens and itself."""
        return self.num_cached + 1

    def query_position(self, tokens: Tensor) -> Tensor:
        """Position within the cache at which the query of each token stands."""
        return tokens.clamp(max=self.num_cached)

    def slot_of(self, tokens: Tensor) -> Tensor:
        """Slot in which each token is stored."""
        ring = self.num_kept + (tokens - self.num_kept).remainder(self.window + 1)
        return torch.where(tokens < self.num_kept, tokens, ring)

    def tokens_in_slots(self, num_seen: Tensor) -> Tensor:
        """Token that each slot holds ``(B, slots)`` after ``num_seen`` ``(B,)`` tokens; -1 where it is empty."""
        slots = torch.arange(self.num_slots, device=num_seen.device)
        seen = num_seen[:, None]
        laps = (seen - 1 - slots).div(self.window + 1, rounding_mode="floor")
        newest = torch.where(slots < self.num_kept, slots, slots + laps * (self.window + 1))
        return torch.where(slots < seen, newest, -1)
