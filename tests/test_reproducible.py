"""Random numbers of fixtures and of hypothesis do not depend on the tests before."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .conftest import fix_seeds


def draw() -> list[float]:
    return [*torch.rand(2).tolist(), random.random()]


@pytest.fixture(scope="module", params=[0, 1])
def drawn() -> list[float]:
    return draw()


def test_a_shared_fixture_draws_from_a_fixed_seed(drawn):
    draw()
    fix_seeds()
    assert draw() == drawn


def test_an_example_that_fails_once_fails_again():
    """Otherwise hypothesis cannot show it, and reports a flaky test."""
    drawn = []

    @given(st.just(0))
    def example(_) -> None:
        drawn.append(draw())

    torch.rand(3)
    example()
    example()
    assert drawn == drawn[:1] * len(drawn)
    assert len(drawn) >= 2
