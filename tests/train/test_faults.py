"""The benchmark that kills training at random, in a short form."""

import pytest

from benchmarks.fault_injection import inject, markdown

pytestmark = pytest.mark.slow


STAGES = [(1, "bf16"), (3, "fp32")]


@pytest.mark.parametrize(("stages", "kills"), [(STAGES[:1], 2), pytest.param(STAGES, 24, marks=pytest.mark.long)])
def test_a_run_that_is_killed_at_random_is_the_undisturbed_run(tmp_path, stages, kills):
    outcomes = inject(tmp_path, stages, [2], kills=kills, seed=0)
    assert all(outcome.is_equal for outcome in outcomes)
    assert sum(outcome.kills for outcome in outcomes) >= kills
    assert len(markdown(outcomes).splitlines()) == 2 + len(stages)
