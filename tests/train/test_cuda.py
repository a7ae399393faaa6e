"""Tests that need a GPU: float16, compilation, and exact resuming."""

import math
from itertools import product

import pytest

from sinklm.train.run import train

from .tiny import assert_same_weights, copy_checkpoint, losses, metrics, weights

pytestmark = pytest.mark.gpu
EAGER = "train.compile=false"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("stage", "optimizer"), [*product(range(4), ["adamw"]), *product(range(3), ["muon"])])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(recipe, tmp_path, stage, optimizer, precision):
    settings = [EAGER, f"deepspeed.zero_stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe, [*settings, f"train.run_dir={whole}"])
    copy_checkpoint(whole, 4, resumed)
    train(recipe, [*settings, f"train.run_dir={resumed}"])
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed, 8), weights(whole, 8))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_in_float16_skips_the_update_and_nothing_else(recipe, tmp_path, stage):
    overflow = ["train.precision=fp16", f"deepspeed.zero_stage={stage}", "deepspeed.fp16.initial_scale_power=32"]
    train(recipe, [EAGER, *overflow, "optimizer.lr=1e-30", f"train.run_dir={tmp_path / 'skipped'}"])
    train(recipe, [EAGER, "train.precision=fp32", "optimizer.lr=1e-30", f"train.run_dir={tmp_path / 'plain'}"])
    skipped, plain = ([m for m in metrics(tmp_path / run) if "loss" in m] for run in ("skipped", "plain"))
    assert all(line["is_skipped"] for line in skipped)
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (32 - i) for i in range(8)]
    # learning rate and data are those of a run without overflow
    assert [line["lr"] for line in skipped] == [line["lr"] for line in plain]
    assert [line["loss"] for line in skipped] == pytest.approx([line["loss"] for line in plain], abs=2e-3)


def test_a_checkpoint_is_converted_on_a_gpu(recipe, tmp_path):
    settings = [EAGER, "train.precision=bf16"]
    train(recipe, [*settings, f"train.run_dir={tmp_path / 'one'}"])
    copy_checkpoint(tmp_path / "one", 4, tmp_path / "three")
    train(recipe, [*settings, "deepspeed.zero_stage=3", f"train.run_dir={tmp_path / 'three'}"])
    expected = list(losses(tmp_path / "one").values())
    assert list(losses(tmp_path / "three").values()) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (2, "fp16")])
def test_muon_learns_the_same_on_a_gpu(recipe, muon_run, tmp_path, stage, precision):
    """As ZeRO-1 in float32, which equals a plain loop on a CPU."""
    settings = [EAGER, f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "optimizer.name=muon"]
    train(recipe, [*settings, f"train.run_dir={tmp_path}"])
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(muon_run).values()), abs=tolerance)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(recipe, tmp_path):
    for name, compiled in (("compiled", "true"), ("eager", "false")):
        train(recipe, [f"train.compile={compiled}", f"train.run_dir={tmp_path / name}"])
    compiled, eager = (list(losses(tmp_path / name).values()) for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, abs=1e-4)
    assert all(math.isfinite(loss) for loss in compiled)
