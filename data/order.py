"""The order of training samples: a pure function of (seed, position), with nothing to build, hold or save.

The permutation of an epoch is a generalised Feistel network over ``Z_a × Z_b`` with ``a·b`` just above the number of
samples, and cycle walking for the few values beyond it (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002, methods FE1 and cycle-walking). Its round function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

import math

import numpy as np

NUM_ROUNDS = 12
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_SALTS = np.arange(NUM_ROUNDS, dtype=np.uint64) * _GOLDEN
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class SampleOrder:
    """Which sample stands at a position of the endless training stream; every epoch is a permutation of its own.

    Args:
        num_samples: samples in an epoch, at least 1.
        seed: any integer from 0 to 2**64 - 1; or None, to keep the samples' own order (data that is shuffled already).
    """

    def __init__(self, num_samples: int, seed: int | None):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; there must be at least one sample")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must lie between 0 and 2**64 - 1")
        self.num_samples = num_samples
        self.seed = seed
        self._a = math.isqrt(num_samples - 1) + 1  # ceil(sqrt(num_samples))
        self._b = -(-num_samples // self._a)

    def __call__(self, i):
        """Sample numbers in ``[0, num_samples)`` for the positions ``i >= 0``.

        ``i`` may be an integer (an int comes back) or an integer array of any shape (int64 of that shape comes back).
        """
        positions = np.asarray(i)
        if positions.dtype.kind not in "iu" or (positions.size and positions.min() < 0):
            raise ValueError(f"positions must be integers >= 0, not {i}")
        epoch, within = np.divmod(positions.astype(np.uint64).reshape(-1), np.uint64(self.num_samples))
        samples = within if self.seed is None else self._permute(within, epoch)
        samples = samples.astype(np.int64).reshape(positions.shape)
        return int(samples) if positions.ndim == 0 else samples

    def _permute(self, values: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Encipher each value under the key of its epoch, until it lands inside the domain. All uint64, 1-d."""
        assert self.seed is not None
        key = _mix(_mix(np.full_like(epoch, self.seed) + _GOLDEN) ^ (epoch + np.uint64(1)) * _GOLDEN)
        values = self._feistel(values, key)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._feistel(values[outside], key[outside])
            outside = outside[values[outside] >= self.num_samples]
        return values

    def _feistel(self, values: np.ndarray, key: np.ndarray) -> np.ndarray:
        """One bijection of ``[0, a·b)`` for each key."""
        a, b = np.uint64(self._a), np.uint64(self._b)
        right, left = np.divmod(values, a)  # left in Z_a, right in Z_b
        for round_, salt in enumerate(_ROUND_SALTS):
            round_key = _mix(key + salt)
            if round_ % 2 == 0:
                left = (left + _mix(right ^ round_key) % a) % a
            else:
                right = (right + _mix(left ^ round_key) % b) % b
        return right * a + left


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit words that leaves no trace of their order."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def batch_indices(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Positions of a rank's share of the batch of ``step`` (from 0), ``(batch_size / world_size,)``.

    The global batch is positions ``[step·batch_size, (step + 1)·batch_size)`` whatever the number of ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
    if step < 0 or batch_size < 1 or batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} samples at step {step} cannot be shared by {world_size} ranks")
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)[rank::world_size]
