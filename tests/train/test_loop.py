"""The loop with steps queued ahead, as on a GPU: its output, and where it stops."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.train import loop
from sinklm.train.run import train
from sinklm.train.step import PendingStep, StepResult, train_step

from .tiny import ahead, assert_same_weights, bad_loss_in, losses, metrics, weights

NUM_MICRO_BATCHES = 2  # of a step in the tiny recipe


@pytest.fixture(autouse=True)
def _running_ahead() -> Iterator[None]:
    with ahead():
        yield


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """The calls that queue and read steps, in order."""
    calls: list[tuple[str, int]] = []
    result = PendingStep.result

    def recorded_step(*args, step, **kwargs) -> PendingStep:
        calls.append(("queue", step))
        return train_step(*args, step=step, **kwargs)

    def recorded_result(self: PendingStep) -> StepResult:
        calls.append(("read", self.step))
        return result(self)

    monkeypatch.setattr(loop, "train_step", recorded_step)
    monkeypatch.setattr(PendingStep, "result", recorded_result)
    return calls


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, ["train.precision=bf16", f"train.run_dir={run_dir}"])
    return run_dir


def timeless(run_dir: Path) -> list[dict]:
    kept = ("step", "loss", "grad_norm", "lr", "validation_loss")
    return [{key: line[key] for key in kept if key in line} for line in metrics(run_dir)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_ahead_is_the_run_that_reads_each_step_at_once(recipe, tmp_path, monkeypatch, calls, precision):
    settings = [f"train.precision={precision}"]
    train(recipe, [*settings, f"train.run_dir={tmp_path / 'ahead'}"])
    order = "queue 1, read 1, queue 2, queue 3, read 2, queue 4, read 3, read 4"  # step 1 and saved steps: read at once
    assert ", ".join(f"{what} {step}" for what, step in calls[:8]) == order
    monkeypatch.setattr(loop, "runs_ahead", lambda _: False)
    train(recipe, [*settings, f"train.run_dir={tmp_path / 'at_once'}"])
    assert timeless(tmp_path / "ahead") == timeless(tmp_path / "at_once")
    assert [line["step"] for line in metrics(tmp_path / "ahead")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert_same_weights(weights(tmp_path / "ahead", 8), weights(tmp_path / "at_once", 8))


@pytest.mark.parametrize(
    ("precision", "step"),
    [("bf16", 1), ("bf16", 3), ("bf16", 4), ("bf16", 5), ("bf16", 8), ("fp32", 3)],
    ids=["first", "before a save", "saved", "after a save", "last", "in float32"],
)
def test_a_bad_step_is_named_and_nothing_after_it_is_kept(recipe, tmp_path, precision, step):
    with (
        bad_loss_in(step, NUM_MICRO_BATCHES),
        pytest.raises(ValueError, match=f"step {step}: the loss is nan on rank 0"),
    ):
        train(recipe, [f"train.precision={precision}", f"train.run_dir={tmp_path}"])
    assert list(losses(tmp_path)) == list(range(1, step))
    assert list(list_checkpoints(tmp_path)) == ([4] if step > 4 else [])


@pytest.mark.parametrize(("signalled_in", "saved"), [(1, 3), (3, 4), (5, 7), (7, 8)])
def test_a_stopped_run_saves_a_whole_step_and_goes_on_bit_for_bit(
    recipe, whole_run, tmp_path, monkeypatch, signalled_in, saved
):
    """The step after the one that reports the signal is already queued, so it is the last one."""
    settings = [f"train.run_dir={tmp_path}", "train.precision=bf16"]

    def signalled_step(*args, step, **kwargs) -> PendingStep:
        pending = train_step(*args, step=step, **kwargs)
        if step == signalled_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return pending

    monkeypatch.setattr(loop, "train_step", signalled_step)
    if saved < 8:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            train(recipe, settings)
    else:
        train(recipe, settings)
    monkeypatch.undo()
    assert max(list_checkpoints(tmp_path)) == saved
    train(recipe, settings)
    assert losses(tmp_path) == losses(whole_run)
    assert_same_weights(weights(tmp_path, 8), weights(whole_run, 8))
