"""The order of training samples: a pure function of (seed, position), without stored state.

The permutation of an epoch is a generalised Feistel network over ``Z_a × Z_b``, where ``a·b`` is
just above the number of samples, with cycle walking for the few values outside the range (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods FE1 and cycle-walking). The
round function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014).
"""

import math

import numpy as np

NUM_ROUNDS = 12
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_SALTS = np.arange(NUM_ROUNDS, dtype=np.uint64) * _GOLDEN
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class SampleOrder:
    """Maps positions of the training stream to samples; every epoch has its own permutation.

    Args:
        num_samples: samples in an epoch, at least 1.
        seed: an integer from 0 to 2**64 - 1, or None to keep the order of data already shuffled.
    """

    def __init__(self, num_samples: int, seed: int | None):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be between 0 and 2**64 - 1")
        self.num_samples = num_samples
        self.seed = seed
        self._a = math.isqrt(num_samples - 1) + 1  # ceil(sqrt(num_samples))
        self._b = -(-num_samples // self._a)

    def __call__(self, i):
        """Return the sample numbers in ``[0, num_samples)`` for the positions ``i >= 0``.

        ``i`` is an integer (returns an int) or an integer array (returns int64 of the same shape).
        """
        positions = np.asarray(i)
        if positions.dtype.kind not in "iu" or (positions.size and positions.min() < 0):
            raise ValueError(f"positions must be integers >= 0, got {i}")
        epoch, within = np.divmod(positions.astype(np.uint64).reshape(-1), np.uint64(self.num_samples))
        samples = within if self.seed is None else self._permute(within, epoch)
        samples = samples.astype(np.int64).reshape(positions.shape)
        return int(samples) if positions.ndim == 0 else samples

    def _permute(self, values: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Encrypt each value with its epoch's key until it is in the domain (uint64, 1-d)."""
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
    """SplitMix64's finaliser, a pseudo-random bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def batch_indices(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Return the positions of one rank's part of a batch, ``(batch_size / world_size,)``.

    The global batch of ``step`` (from 0) is ``[step·batch_size, (step + 1)·batch_size)`` for any
    number of ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be between 0 and {world_size - 1} for {world_size} ranks")
    if step < 0 or batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"step {step}: a batch of {batch_size} samples cannot be divided among {world_size} ranks; "
            "step must be >= 0 and the batch a multiple of the ranks"
        )
    return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)[rank::world_size]
