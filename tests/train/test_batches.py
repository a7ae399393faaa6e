"""Batches: the same samples on any number of ranks, from any step."""

import numpy as np
import pytest
import torch

from sinklm.data import SampleOrder, TokenStore, TokenWindows
from sinklm.train.batches import MicroBatches, read_samples

BATCH = 12


@pytest.fixture(scope="module")
def windows(store) -> TokenWindows:
    return TokenWindows(TokenStore(store), "train", tokens_per_sample=16, stride=16)


def read(windows, num_steps, *, first_step=0, rank=0, world_size=1, micro_batch_size=2) -> torch.Tensor:
    """The samples of a rank: (steps, samples of a step, tokens)."""
    batches = MicroBatches(
        windows,
        SampleOrder(len(windows), seed=3),
        samples_per_step=BATCH,
        micro_batch_size=micro_batch_size,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )
    share = BATCH // world_size
    samples = torch.cat([next(batches) for _ in range(num_steps * share // micro_batch_size)])
    batches.close()
    return samples.reshape(num_steps, share, -1)


def test_batches_are_the_order_s_windows(windows):
    order = SampleOrder(len(windows), seed=3)
    expected = [[windows[order(step * BATCH + i)] for i in range(BATCH)] for step in range(3)]
    assert torch.equal(read(windows, 3), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_together_read_the_same_batch(windows, world_size, micro_batch_size):
    whole = read(windows, 2)
    for rank in range(world_size):
        share = read(windows, 2, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        assert torch.equal(share, whole[:, rank::world_size])


def test_a_later_start_reads_the_same_batches(windows):
    num_steps = len(windows) // BATCH + 3  # into the second epoch
    assert torch.equal(read(windows, 2, first_step=num_steps - 2), read(windows, num_steps)[-2:])


def test_a_file_that_cannot_be_read_stops_the_run_with_its_rank(windows):
    class Broken:
        tokens_per_sample = 16

        def __len__(self):
            return 10

        def __getitem__(self, i):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="rank 1 cannot read its next samples: the disk is gone"):
        read(Broken(), 1, rank=1, world_size=2)


def test_samples_are_copies(windows):
    first = read_samples(windows, np.array([0]), pin=False)
    first.zero_()
    assert read_samples(windows, np.array([0]), pin=False).any()
