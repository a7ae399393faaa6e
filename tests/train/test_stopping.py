"""A run stops after a signal or when its time is up, with its state saved."""

import os
import signal
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.train.run import train
from sinklm.train.saving import TYPICAL_DISK
from sinklm.train.stopping import REQUEUE_STATUS, STOP_SIGNALS, StopRequest, TimeLimit, exit_status, restored_handlers

from .tiny import losses, metrics, wait_for_step


def test_a_signal_is_recorded_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.code
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # launchers send both; the first one counts
        assert stop.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_an_error_a_signal_is_still_recorded():
    """Launchers send SIGTERM when another rank fails."""
    before = signal.getsignal(signal.SIGTERM)
    with restored_handlers():
        with pytest.raises(RuntimeError, match="lost contact"), StopRequest() as stop:
            raise RuntimeError("lost contact")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_during_the_setup_a_planned_end_has_its_status_too(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, restored_handlers():
        os.kill(os.getpid(), number)
    assert ended.value.code == REQUEUE_STATUS
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored():
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.code
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_is_announced_once():
    said: list[str] = []
    stop = StopRequest(said.append)
    stop.announce(signal.SIGINT)
    stop.announce(signal.SIGTERM)
    (message,) = said
    first, second = message.split("; ")
    assert first == "SIGINT: finishing the current steps, then saving"
    assert second == "to stop without saving, wait 3 seconds and press Ctrl-C again"


@pytest.fixture
def heeded(number):
    """A signal that is heeded even if a shell ignores it for pytest, as for background jobs."""
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    yield number
    signal.signal(number, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_signal_saves_the_state_and_ends_with_its_status(recipe, tmp_path, number, heeded, capsys):
    def send() -> None:
        try:
            wait_for_step(tmp_path, 2)
        finally:  # or training would not end
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        train(recipe, [f"train.run_dir={tmp_path}", "train.num_steps=100000", "validation.every_steps=null"])
    assert ended.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number, 75)
    assert max(list_checkpoints(tmp_path)) == max(losses(tmp_path))
    out = capsys.readouterr().out
    assert out.index(f"{number.name}: finishing the current steps") < out.index(
        f"stopped by {number.name}; the state is saved"
    )


def test_a_run_whose_time_is_up_saves_and_asks_to_be_run_again(recipe, tmp_path, capsys):
    overrides = [f"train.run_dir={tmp_path}", "train.num_steps=3"]
    for expected in ([1], [1, 2]):  # this process is older than that
        with pytest.raises(SystemExit) as ended:
            train(recipe, [*overrides, "train.max_minutes=0.001"])
        assert ended.value.code == REQUEUE_STATUS
        assert list(list_checkpoints(tmp_path)) == expected
        assert "stopped by train.max_minutes; the state is saved" in capsys.readouterr().out
    train(recipe, [*overrides, "train.max_minutes=0.001"])  # the last step needs no further run
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_a_validation_for_which_there_is_no_time_is_left_out(recipe, tmp_path):
    overrides = [f"train.run_dir={tmp_path}", "train.num_steps=4", "validation.every_steps=2"]
    with patch.object(TimeLimit, "is_up", lambda self, *_, validates: validates), pytest.raises(SystemExit) as ended:
        train(recipe, overrides)
    assert ended.value.code == REQUEUE_STATUS
    assert list(list_checkpoints(tmp_path)) == [2]
    assert validated(tmp_path) == []
    train(recipe, overrides)
    assert validated(tmp_path) == [4]


def validated(run_dir: Path) -> list[int]:
    """Return the steps with a validation loss."""
    return [record["step"] for record in metrics(run_dir) if "validation_loss" in record]


SECONDS = st.floats(0, 1e3)


@given(st.floats(0.01, 1e4), SECONDS, SECONDS, SECONDS, st.floats(0, 1e5))
def test_the_time_limit_leaves_time_for_a_step_a_validation_and_a_save(max_minutes, save, validation, step, age):
    limit = TimeLimit(max_minutes, save_seconds=1e9)
    limit.measure("save", save)
    limit.measure("validation", validation)
    if not limit.is_up(age, step):
        assert age + 2 * step + 2 * save <= 60 * max_minutes
    if not limit.is_up(age, step, validates=True):
        assert age + 2 * step + validation + 2 * save <= 60 * max_minutes


def test_time_is_left_for_a_validation_that_was_never_measured():
    limit = TimeLimit(60, save_seconds=2)
    assert not limit.is_up(3560, 1)
    assert limit.is_up(3560, 1, validates=True)


@pytest.mark.parametrize("num_bytes", [2e9, 20e9, 190e9])
def test_a_model_of_any_size_trains_before_its_first_save(num_bytes):
    limit = TimeLimit(120, num_bytes / TYPICAL_DISK)
    assert not limit.is_up(3600, 60)


def test_without_a_limit_time_is_never_up():
    assert not TimeLimit(None, 0.0).is_up(1e9, float("nan"))


def test_only_a_planned_end_asks_to_be_run_again():
    planned = {number for number in STOP_SIGNALS if exit_status(number) == REQUEUE_STATUS}
    assert planned == {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
