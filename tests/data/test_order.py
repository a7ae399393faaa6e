import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.data import SampleOrder, batch_indices
from sinklm.data.order import NUM_ROUNDS

sizes = st.one_of(st.integers(1, 40), st.integers(1, 3000))
seeds = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_order(num_samples: int, seed: int, i: int) -> int:
    """The same permutation in plain integers, one position at a time."""
    golden = 0x9E3779B97F4A7C15
    a = math.isqrt(num_samples)
    a += a * a < num_samples
    b = -(-num_samples // a)
    epoch, value = divmod(i, num_samples)
    key = mix(mix((seed + golden) & MASK) ^ ((epoch + 1) * golden & MASK))
    while True:
        right, left = divmod(value, a)
        for round_ in range(NUM_ROUNDS):
            round_key = mix((key + round_ * golden) & MASK)
            if round_ % 2 == 0:
                left = (left + mix(right ^ round_key) % a) % a
            else:
                right = (right + mix(left ^ round_key) % b) % b
        value = right * a + left
        if value < num_samples:
            return value


@given(sizes, seeds, st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    assert np.array_equal(np.sort(SampleOrder(num_samples, seed)(positions)), np.arange(num_samples))


@given(st.integers(1, 10**12), seeds, st.lists(st.integers(0, 10**15), min_size=1, max_size=5))
def test_array_scalar_and_plain_integers_agree(num_samples: int, seed: int, positions: list[int]) -> None:
    order = SampleOrder(num_samples, seed)
    expected = [slow_order(num_samples, seed, i) for i in positions]
    assert order(np.array(positions)).tolist() == expected
    assert [order(i) for i in positions] == expected
    assert order(np.array([positions])).shape == (1, len(positions))


def test_the_order_never_changes_between_versions() -> None:
    # A resumed run must get the same samples, so these numbers must never change.
    assert SampleOrder(1000, 1234)(np.arange(998, 1004)).tolist() == [997, 401, 914, 112, 969, 619]


@given(seeds)
def test_epochs_and_seeds_differ(seed: int) -> None:
    n = 1000
    order = SampleOrder(n, seed)
    first, second = order(np.arange(n)), order(np.arange(n, 2 * n))
    other = SampleOrder(n, (seed + 1) % 2**64)(np.arange(n))
    # Two random permutations agree in one place on average; 12 has a probability of 1e-9.
    assert (first == second).sum() < 12
    assert (first == other).sum() < 12
    assert (first == np.arange(n)).sum() < 12


def test_the_order_has_no_structure() -> None:
    n = 10007
    order = np.stack([SampleOrder(n, seed)(np.arange(n)) for seed in range(20)])
    neighbours = np.diff(order, axis=1)
    # Correlation between position and sample, and between neighbours: standard deviation
    # 1/sqrt(20·n) = 0.0022.
    assert abs(np.mean([np.corrcoef(np.arange(n), row)[0, 1] for row in order])) < 0.01
    assert abs(np.mean([np.corrcoef(row[:-1], row[1:])[0, 1] for row in order])) < 0.01
    # A random permutation has one neighbour pair (k, k+1) on average.
    assert (neighbours == 1).sum(axis=1).mean() < 2.5
    # Every quarter of the epoch draws evenly from every tenth of the data: chi-squared, 27 degrees
    # of freedom.
    quarters = np.minimum(np.arange(n) * 4 // n, 3)
    chi = [_chi_squared(quarters, np.minimum(row * 10 // n, 9)) for row in order]
    assert np.mean(chi) < 27 * 1.5


def _chi_squared(rows: np.ndarray, columns: np.ndarray) -> float:
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def test_all_permutations_of_a_small_set_are_equally_likely() -> None:
    epochs = SampleOrder(3, 0)(np.arange(3 * 6000)).reshape(6000, 3)
    permutations, counts = np.unique(epochs, axis=0, return_counts=True)
    # Six permutations, 1000 each; six standard deviations are 173.
    assert len(permutations) == 6
    assert np.abs(counts - 1000).max() < 173


def test_without_a_seed_the_order_of_the_data_is_kept() -> None:
    assert SampleOrder(5, None)(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 5))
def test_any_number_of_ranks_shares_the_same_batch(step: int, world_size: int, factor: int) -> None:
    batch_size = 12 * factor
    shares = [batch_indices(step, batch_size, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {batch_size // world_size}
    assert sorted(np.concatenate(shares).tolist()) == list(range(step * batch_size, (step + 1) * batch_size))


@given(sizes, seeds, st.integers(1, 30))
def test_resuming_at_any_step_gives_the_samples_of_the_whole_run(n: int, seed: int, first_step: int) -> None:
    whole = SampleOrder(n, seed)(np.arange(40 * 4)).reshape(40, 4)
    resumed = SampleOrder(n, seed)
    for step in (first_step, first_step + 1):
        assert np.array_equal(resumed(batch_indices(step, 4)), whole[step])


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(0, 1)
    with pytest.raises(ValueError, match="seed is -1"):
        SampleOrder(1, -1)
    for positions in (-1, 0.5, np.array([3, -2])):
        with pytest.raises(ValueError, match="integers >= 0"):
            SampleOrder(4, 1)(positions)
    with pytest.raises(ValueError, match="rank is 2; it must be between 0 and 1 for 2 ranks"):
        batch_indices(0, 4, 2, 2)
    with pytest.raises(ValueError, match="cannot be divided among 3 ranks"):
        batch_indices(0, 4, 0, 3)
