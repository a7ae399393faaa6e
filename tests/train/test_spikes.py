"""Spikes of the loss and of the gradient's norm: the rule, and what each choice does with them."""

import math
import re
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklm.data import SampleOrder, TokenStore, TokenWindows, batch_indices
from sinklm.train import spikes
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.spikes import MIN_STEPS, NUM_DEVIATIONS, WINDOW, SpikeGuard, find_spikes

from .plain import play_kernel
from .tiny import ahead, assert_same_weights, bad_loss_in, copy_checkpoint, losses, metrics, moments, weights

NUM_MICRO_BATCHES = 2  # of a step in the tiny recipe
SPIKE, FACTOR = 4, 30.0  # step, and by how much its loss is larger; more would overflow in fp16
EVERY_STEP = ["train.num_steps=6", "checkpoint.every_steps=1", "checkpoint.keep=null", "validation.every_steps=null"]
DETERMINISTIC = "train.deterministic=true"  # a GPU adds the gradient of the embedding in any order otherwise
# Every code path of the update: FusedUpdate, BF16_Optimizer, ZeRO-1/2, ZeRO-3, none, and a scaler.
PATHS = [
    ["deepspeed.zero_stage=1", "train.precision=bf16"],
    ["deepspeed.zero_stage=1", "train.precision=bf16", "deepspeed.patches=false"],
    ["deepspeed.zero_stage=2", "train.precision=fp32"],
    ["deepspeed.zero_stage=2", "train.precision=fp32", "deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
    ["deepspeed.zero_stage=3", "train.precision=bf16"],
    ["deepspeed.zero_stage=0", "train.precision=fp32"],
    ["deepspeed.zero_stage=1", "train.precision=bf16", "optimizer.name=muon"],
    ["deepspeed.zero_stage=2", "train.precision=fp32", "optimizer.name=muon"],
    pytest.param(["deepspeed.zero_stage=0", "train.precision=fp16", DETERMINISTIC], marks=pytest.mark.gpu),
    pytest.param(["deepspeed.zero_stage=1", "train.precision=fp16", DETERMINISTIC], marks=pytest.mark.gpu),
]


def slow_verdicts(values: np.ndarray) -> list[list[bool]]:
    """The rule in plain numpy, for values ``(steps, 2)``."""
    window: deque[np.ndarray] = deque(maxlen=WINDOW)
    verdicts = []
    for loss, norm in values:
        past = np.array(window).reshape(-1, 2)
        if len(window) < MIN_STEPS:
            verdicts.append([loss > 2 * math.log(300), False])
        else:
            limits = past.mean(0) + NUM_DEVIATIONS * past.std(0, ddof=1)
            verdicts.append([loss > limits[0], norm > limits[1]])
        window.append(np.array([loss, norm]))
    return verdicts


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(0, 300))
def test_the_rule_is_the_slow_one_and_survives_saving(seed, num_steps, saved_after):
    chance = np.random.default_rng(seed)
    values = chance.normal([3.0, 0.5], [0.1, 0.05], (num_steps, 2)).astype(np.float32)
    values[chance.random((num_steps, 2)) < 0.02] *= 3
    values[chance.random((num_steps, 2)) < 0.02] *= 4.5  # above the limit of the first steps
    guard = SpikeGuard(torch.device("cpu"), 300, holds_back=True)
    found = []
    for step, (loss, norm) in enumerate(values.tolist()):
        if step == saved_after:
            state = guard.state_dict()
            guard.begin(torch.tensor(1e6))
            guard.judge(1e6)  # after the state was taken, and no part of it
            guard = SpikeGuard(torch.device("cpu"), 300, holds_back=True)
            guard.load_state_dict(state)
        guard.begin(torch.tensor(loss))
        is_held = guard.judge(torch.tensor(norm))
        assert guard.verdict is not None
        found.append([bool(flag) for flag in guard.verdict[:, 0]])
        assert bool(is_held) == any(found[-1])
    assert found == slow_verdicts(values.astype(np.float64))


def test_a_level_that_lasts_is_no_spike_for_long():
    guard, spiked = SpikeGuard(torch.device("cpu"), 50_000, holds_back=False), []
    for step in range(300):
        guard.begin(torch.tensor((3.0 if step < 150 else 6.0) + 0.01 * (step % 7)))
        assert not guard.judge(1.0)  # a guard that only warns holds nothing back
        assert guard.verdict is not None
        spiked += [step] if guard.verdict[0, 0] else []
    assert spiked == list(range(150, 150 + len(spiked)))
    assert 1 <= len(spiked) < 10


def test_a_record_names_value_mean_and_deviation():
    found = find_spikes([[1.0, 3.0, 0.5], [0.0, 1.0, 0.1]], 9.0, 1.1)
    assert list(found) == ["loss"]
    assert str(found["loss"]) == "9 is a spike (last steps: mean 3, standard deviation 0.5)"


@pytest.fixture(autouse=True)
def _short_window(request, monkeypatch):
    """Judges from the third step on, so that runs of six steps can have a spike."""
    if "recipe" in request.fixturenames:
        monkeypatch.setattr(spikes, "MIN_STEPS", 3)


def run(recipe: str, run_dir: Path, *more: str, factor: float = FACTOR) -> Path:
    with bad_loss_in(SPIKE, NUM_MICRO_BATCHES, factor):
        train(recipe, [f"train.run_dir={run_dir}", *more])
    return run_dir


@pytest.mark.parametrize("path", PATHS, ids=lambda path: " ".join(path).replace("deepspeed.", ""))
def test_a_skipped_step_changes_neither_weights_nor_optimizer_and_resumes_bit_for_bit(recipe, tmp_path, path):
    whole = run(recipe, tmp_path / "whole", "train.on_spike=skip", *EVERY_STEP, *path)
    before, after = moments(whole, SPIKE - 1), moments(whole, SPIKE)
    assert len(before) > 2
    assert all(map(torch.equal, before, after))
    assert_same_weights(weights(whole, SPIKE - 1), weights(whole, SPIKE))
    following = weights(whole, SPIKE + 1)
    assert not any(torch.equal(weight, following[name]) for name, weight in weights(whole, SPIKE).items())
    spiked = [line for line in metrics(whole) if "spikes" in line]
    assert [(line["step"], line["is_skipped"]) for line in spiked] == [(SPIKE, True)]

    copy_checkpoint(whole, SPIKE - 1, tmp_path / "resumed")  # the window before the spike is in the checkpoint
    with bad_loss_in(1, NUM_MICRO_BATCHES, FACTOR):
        train(recipe, [f"train.run_dir={tmp_path / 'resumed'}", "train.on_spike=skip", *EVERY_STEP, *path])
    assert losses(tmp_path / "resumed") == losses(whole)
    assert_same_weights(weights(tmp_path / "resumed", 6), weights(whole, 6))


def test_the_kernel_skips_a_spike(recipe, tmp_path, monkeypatch):
    play_kernel(monkeypatch.setattr)
    run(recipe, tmp_path, "train.on_spike=skip", "train.precision=bf16", *EVERY_STEP)
    assert all(map(torch.equal, moments(tmp_path, SPIKE - 1), moments(tmp_path, SPIKE)))
    assert_same_weights(weights(tmp_path, SPIKE - 1), weights(tmp_path, SPIKE))
    assert not all(map(torch.equal, moments(tmp_path, SPIKE), moments(tmp_path, SPIKE + 1)))


@pytest.mark.parametrize("is_ahead", [False, True])
def test_warn_changes_nothing_and_names_the_samples(recipe, store, tmp_path, capsys, is_ahead):
    with ahead() if is_ahead else nullcontext():
        run(recipe, tmp_path / "run", "train.precision=bf16", "validation.every_steps=null")
    (line,) = (line for line in metrics(tmp_path / "run") if "spikes" in line)
    assert (line["step"], line["is_skipped"]) == (SPIKE, False)
    found = line["spikes"]["loss"]
    assert found["value"] == line["loss"] == pytest.approx(FACTOR * found["mean"], rel=0.5)
    assert line["spikes"]["grad_norm"]["value"] == line["grad_norm"]
    assert line["loss_by_rank"] == [line["loss"]]
    windows = TokenWindows(TokenStore(store), "train", tokens_per_sample=32, stride=32)
    assert line["samples"] == SampleOrder(len(windows), 7)(batch_indices(SPIKE - 1, 8)).tolist()
    told = [text for text in capsys.readouterr().out.splitlines() if "is a spike" in text]
    assert len(told) == 1
    assert re.match(rf"step {SPIKE}: the loss \S+ is a spike .* and the gradient norm .*; training goes on", told[0])
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize("is_ahead", [False, True])
def test_stop_ends_the_run_and_saves_nothing(recipe, tmp_path, is_ahead):
    with (
        ahead() if is_ahead else nullcontext(),
        pytest.raises(ValueError, match=f"step {SPIKE}: the loss .* is a spike"),
    ):
        run(recipe, tmp_path, "train.on_spike=stop", "train.precision=bf16", "validation.every_steps=null")
    assert list(losses(tmp_path)) == list(range(1, SPIKE))
    last = metrics(tmp_path)[-1]
    assert (last["step"], len(last["samples"]), len(last["loss_by_rank"])) == (SPIKE, 8, 1)
    assert "train.on_spike=stop" in last["error"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_loss_that_is_not_finite_is_recorded_with_its_samples(recipe, tmp_path, precision):
    with pytest.raises(ValueError, match=r"loss is nan on rank 0.*samples are in metrics\.jsonl"):
        run(recipe, tmp_path, f"train.precision={precision}", "validation.every_steps=null", factor=math.nan)
    last = metrics(tmp_path)[-1]
    assert (last["step"], last["loss_by_rank"], len(last["samples"])) == (SPIKE, [None], 8)


def test_a_run_that_diverges_at_once_is_noticed_before_there_is_a_window(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "MIN_STEPS", MIN_STEPS)
    with pytest.raises(ValueError, match="is more than twice the loss of a uniform guess"):
        train(recipe, [f"train.run_dir={tmp_path}", "optimizer.lr=10.0", "train.on_spike=stop"])


OFF = "deepspeed.zero_optimization.offload_optimizer={device: none, ratio: 0.5, super_offload: 0}"


@pytest.mark.parametrize("key", ["zenflow={}", "offload_optimizer={device: cpu, ratio: 0.5}"])
def test_skip_is_refused_where_deepspeed_updates_by_itself(key):
    settings = ["train.on_spike=skip", f"deepspeed.zero_optimization.{key}"]
    with pytest.raises(ValueError, match=r"train\.on_spike=skip does not work with deepspeed\.zero_optimization\."):
        load_config("quickstart", settings)
    load_config("quickstart", ["train.on_spike=skip", OFF])


def test_the_window_is_part_of_the_run(recipe, tmp_path):
    """A run that resumes right before a spike judges it like the run that never stopped."""
    whole = run(recipe, tmp_path / "whole", *EVERY_STEP)
    copy_checkpoint(whole, SPIKE - 1, tmp_path / "resumed")
    with bad_loss_in(1, NUM_MICRO_BATCHES, FACTOR), patch.object(spikes, "MIN_STEPS", SPIKE - 1):
        train(recipe, [f"train.run_dir={tmp_path / 'resumed'}", *EVERY_STEP])
    found = [[line.get("spikes") for line in metrics(folder) if line["step"] == SPIKE] for folder in tmp_path.iterdir()]
    assert found[0] == found[1] != [None]
