"""The learning rate and the list of steps that are saved."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.train.config import CheckpointSection, OptimizerSection
from sinklm.train.schedule import is_pythia_step, learning_rate, saves_after

settings = st.builds(
    OptimizerSection,
    lr=st.floats(1e-6, 1),
    min_lr_ratio=st.floats(0, 1),
    warmup_ratio=st.floats(0, 1),
)


@given(settings, st.one_of(st.integers(1, 12), st.integers(1, 5000)))
def test_the_rate_rises_then_falls_to_its_end(optimizer, num_steps):
    rates = [learning_rate(step, num_steps, optimizer) for step in range(num_steps)]
    num_warmup_steps = round(num_steps * optimizer.warmup_ratio)
    peak = max(num_warmup_steps - 1, 0)
    rounding = 1 + 1e-9
    assert all(0 < a <= b * rounding for a, b in pairwise(rates[: peak + 1]))
    assert all(a * rounding >= b for a, b in pairwise(rates[peak:]))
    assert max(rates) == pytest.approx(optimizer.lr)
    if num_steps > num_warmup_steps + 1:
        assert rates[-1] == pytest.approx(optimizer.lr * optimizer.min_lr_ratio)


def test_the_rate_halfway_down_is_the_mean_of_both_ends():
    optimizer = OptimizerSection(lr=1.0, min_lr_ratio=0.1, warmup_ratio=0.01)
    assert learning_rate(0, 1001, optimizer) == 0.1  # the first of ten warm-up steps
    assert learning_rate(505, 1001, optimizer) == pytest.approx(0.55)
    assert math.isclose(learning_rate(1000, 1001, optimizer), 0.1)


def test_pythia_published_154_checkpoints():
    steps = [step for step in range(143_001) if is_pythia_step(step)]
    assert steps[:13] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert len(steps) == 154


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"every_steps": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"every_steps": 4}, [4, 8, 10]),
        ({"every_steps": None}, [10]),
        ({"every_steps": None, "pythia_steps": True}, [0, 1, 2, 4, 8, 10]),
    ],
)
def test_what_is_saved(section, expected):
    is_due = saves_after(10, CheckpointSection(**section))
    assert [step for step in range(11) if is_due(step)] == expected
