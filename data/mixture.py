"""Training on sets of documents with given weights.

Positions of the training stream are divided into blocks. A block has a fixed number of positions of
each set, in random order. In the first b blocks, a set of share p has ⌊b·B·p⌋ positions (B is the
size of a block; the largest set has the rest), so shares are exact over any length, for any
weights. If a set has n positions in the first b blocks, its windows there are the first n of its
own `SampleOrder`, in random order within each block: each set has epochs of its own. All is
computed from (seed, position), so there is no state.
"""

import hashlib
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from .order import SampleOrder
from .store import TokenStore
from .windows import TokenWindows

BLOCK = 1024


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Return the exact share of each set: its weight, as written in decimal, over the sum.

    The sets are sorted by name, so that the order of the weights does not matter.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in sorted(weights.items())}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items() if weight}


class SetWindows:
    """The windows of several sets, one set after the other. It has the interface of `TokenWindows`.

    A set is a sequence of its own: its documents in manifest order. No window has documents of two
    sets.

    Args:
        store: an open token store in which each shard has documents of one set, see
            ``sinklm prepare --split-sets``.
        split: "train" or "validation".
        set_names: the sets.
        tokens_per_sample: as for `TokenWindows`.
        stride: the same.

    Attributes:
        num_windows: number of windows of each set.

    Raises:
        ValueError: a set is unknown, shorter than one window, or mixed with others in a shard.
    """

    def __init__(self, store: TokenStore, split: str, set_names: list[str], *, tokens_per_sample: int, stride: int):
        self.tokens_per_sample = tokens_per_sample
        self._windows = {
            name: TokenWindows(store, split, tokens_per_sample=tokens_per_sample, stride=stride, set_name=name)
            for name in set_names
        }
        self.num_windows = {name: len(windows) for name, windows in self._windows.items()}
        self._starts = np.cumsum([0, *self.num_windows.values()])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a copy of window ``i``, int64 ``(tokens_per_sample,)``."""
        name, i = self.place_of(i)
        return self._windows[name][i]

    def place_of(self, i: int) -> tuple[str, int]:
        """Return the set of window ``i`` and its number within the set."""
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} is out of range; there are {len(self)}")
        place = int(np.searchsorted(self._starts, i, side="right")) - 1
        return list(self._windows)[place], int(i) - int(self._starts[place])


class WeightedOrder:
    """Maps positions of the training stream to windows of `SetWindows`; see the module.

    Args:
        num_windows: number of windows of each set, in the order of `SetWindows`.
        weights: weight of each set, at least 0; only their ratios matter.
        seed: an integer from 0 to 2**64 - 1.
    """

    def __init__(self, num_windows: Mapping[str, int], weights: Mapping[str, float], seed: int):
        shares = shares_of(weights)
        if missing := shares.keys() - num_windows.keys():
            raise ValueError(f"set {sorted(missing)[0]!r} has no windows")
        self.shares = shares
        names = list(num_windows)
        self._starts = np.cumsum([0, *num_windows.values()])[[names.index(name) for name in shares]]
        self._orders = [SampleOrder(num_windows[name], _seed_of(seed, f"set {name}")) for name in shares]
        self._largest = max(range(len(shares)), key=list(shares.values()).__getitem__)
        # Rounding moves less than one position per set, which the largest set must have.
        self.block = max(BLOCK, len(shares) ** 2)
        self._within = SampleOrder(self.block, _seed_of(seed, "blocks"))

    def num_before(self, block: int) -> np.ndarray:
        """Return the number of positions of each set in the first ``block`` blocks."""
        counts = [block * self.block * share.numerator // share.denominator for share in self.shares.values()]
        counts[self._largest] += block * self.block - sum(counts)
        return np.array(counts, np.int64)

    def __call__(self, i):
        """Return the window numbers for the positions ``i >= 0``.

        ``i`` is an integer (returns an int) or an integer array (returns int64 of the same shape).
        """
        positions = np.asarray(i)
        flat = positions.reshape(-1)
        places = self._within(flat)  # checks the positions
        windows = np.empty(flat.shape, np.int64)
        blocks = flat.astype(np.uint64) // np.uint64(self.block)
        for block in np.unique(blocks):
            chosen = np.flatnonzero(blocks == block)
            before = self.num_before(int(block))
            ends = np.cumsum(self.num_before(int(block) + 1) - before)
            sets = np.searchsorted(ends, places[chosen], side="right")
            for k in np.unique(sets):
                of_set = chosen[sets == k]
                first = ends[k - 1] if k else 0
                windows[of_set] = self._starts[k] + self._orders[k](before[k] + places[of_set] - first)
        return int(windows[0]) if positions.ndim == 0 else windows.reshape(positions.shape)


def _seed_of(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "big")
