"""Training of the sink tokens alone."""

import pytest
import torch

from sinklm.checkpoints.warm_start import load_weights
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.summary import describe_optimizer

from .plain import batches_of
from .tiny import assert_same_weights, copy_checkpoint, losses, metrics, weights

EMBEDDING = "gpt_neox.embed_in.weight"
SINKS = slice(300, 303)


@pytest.fixture(scope="module")
def settings(whole_run):
    return [
        "train.only_sinks=true",
        "deepspeed.zero_stage=0",
        "model.sink.num_tokens=3",
        f"model.init_from={whole_run}",
    ]


@pytest.fixture(scope="module")
def plan(recipe, settings):
    return Plan(load_config(recipe, settings), 1, 300)


@pytest.fixture(scope="module")
def run(recipe, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks")
    train(recipe, [*settings, f"train.run_dir={folder}"])
    return folder


def assert_only_the_sinks_changed(found, start):
    assert found.keys() == start.keys()
    for name in found.keys() - {EMBEDDING}:
        assert torch.equal(found[name], start[name]), name
    changed = (found[EMBEDDING] != start[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(SINKS.start, SINKS.stop))


def started(plan):
    torch.manual_seed(plan.config.train.seed)
    return load_weights(plan.config.model.init_from, plan.model_config)


def saved_names(model):
    return {name.replace("lm_head", "embed_out"): weight for name, weight in model.state_dict().items()}


def test_no_other_weight_changes(run, plan):
    assert_only_the_sinks_changed(weights(run, 8), saved_names(started(plan)))
    assert losses(run)[8] < losses(run)[1]


def test_the_norm_is_that_of_the_sinks_gradient(run, plan):
    model, samples = started(plan), next(batches_of(plan))
    model(samples[:, :-1], labels=samples).loss.backward()
    first = next(line for line in metrics(run) if "grad_norm" in line)
    norm = model.gpt_neox.embed_in.weight.grad[SINKS].norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_resumed_run_is_the_same_without_the_model_that_it_started_from(recipe, settings, run, tmp_path):
    copy_checkpoint(run, 4, tmp_path)
    train(recipe, [*settings, f"train.run_dir={tmp_path}", "model.init_from=/nowhere"])
    assert_same_weights(weights(tmp_path, 8), weights(run, 8))


def test_a_run_goes_on_in_another_precision(recipe, settings, run, plan, tmp_path):
    copy_checkpoint(run, 4, tmp_path)
    others = ["train.precision=bf16", "model.init_from=/nowhere"]  # converts the checkpoint
    train(recipe, [*settings, f"train.run_dir={tmp_path}", *others])
    assert_only_the_sinks_changed(weights(tmp_path, 8), saved_names(started(plan)))
    torch.testing.assert_close(weights(tmp_path, 8)[EMBEDDING], weights(run, 8)[EMBEDDING], atol=0.02, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_no_other_weight_changes_on_a_gpu(recipe, settings, plan, tmp_path, precision):
    train(recipe, [*settings, f"train.run_dir={tmp_path}", f"train.precision={precision}", "train.compile=true"])
    assert_only_the_sinks_changed(weights(tmp_path, 8), saved_names(started(plan)))
    assert losses(tmp_path)[8] < losses(tmp_path)[1]


def test_a_run_cannot_change_what_it_trains(recipe, settings, run, tmp_path):
    copy_checkpoint(run, 4, tmp_path)
    with pytest.raises(ValueError, match=r"train\.only_sinks is False, but .* was trained with True: restore"):
        train(recipe, [*settings, f"train.run_dir={tmp_path}", "train.only_sinks=false"])


def test_the_cost_is_that_of_the_rows(recipe, plan):
    whole = Plan(load_config(recipe, ["model.sink.num_tokens=3"]), 1, 300)
    num_frozen = 2 * (12 * 32 * 32 + 13 * 32) + 384 * 32 + 2 * 32  # layers, head, last norm
    assert whole.flops_per_token() - plan.flops_per_token() == 2 * num_frozen
    assert describe_optimizer(plan) == "AdamW for 96 parameters: the rows of the sink tokens"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (
                f"model.sink.kind={kind}",
                rf"requires model\.sink\.kind=token, whose rows are trained \(sink\.kind {kind} has no rows\)",
            )
            for kind in ("none", "zero", "logit", "kv_bias", "gate", "head_gate")
        ),
        ("model.init_from=null", r"requires model\.init_from, the model"),
        ("deepspeed.zero_stage=1", r"requires deepspeed\.zero_stage=0, which"),
        ("optimizer.name=muon", r"requires optimizer\.name=adamw, because"),
    ],
)
def test_what_is_missing_is_named(recipe, settings, override, message):
    others = ["model.sink.num_tokens=1"] if "kind" in override else []
    with pytest.raises(ValueError, match=rf"train\.only_sinks=true {message}.*: set it, or train\.only_sinks=false"):
        load_config(recipe, [*settings, *others, override])
