"""The short form of `benchmarks/damage.py`: no random damage is unnoticed."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("num_trials", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.long])])
def test_no_random_damage_is_unnoticed(num_trials, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "damage.py"
    specification = importlib.util.spec_from_file_location("damage", path)
    damage = importlib.util.module_from_spec(specification)
    sys.modules["damage"] = damage  # dataclasses need it
    try:
        specification.loader.exec_module(damage)
        outcomes = damage.measure(num_trials=num_trials, seed=0, zero_stage=1)
    finally:
        del sys.modules["damage"]
    assert set(outcomes) == {"checkpoint", "evaluation", "export", "store"}
    assert outcomes["checkpoint"] == {"recovered": num_trials}
    assert outcomes["evaluation"] == {"error": num_trials}
    for counts in outcomes.values():
        assert not any(outcome.isupper() for outcome in counts), capsys.readouterr().out
