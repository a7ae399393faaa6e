"""Samples in segments: the losses of one pass, gradients that end at the borders of segments."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.loss import IGNORED
from sinklm.train.engine import deepspeed_config
from sinklm.train.memory import estimate_memory
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.schedule import learning_rate
from sinklm.train.segments import pass_losses, segment_bounds

from .plain import batches_of, plain_optimizer
from .tiny import assert_same_weights, copy_checkpoint, losses, metrics, weights

WINDOW = ["model.attention.pattern=window", "model.attention.window=11"]
SEGMENTS = [*WINDOW, "train.segment_length=8"]


def make_plan(*overrides: str, num_sinks: int = 1) -> Plan:
    sink = f"model.sink.num_tokens={num_sinks}" if num_sinks else "model.sink.kind=none"
    sizes = [f"train.{key}={value}" for key, value in (("seq_length", 24), ("batch_size_tokens", 48))]
    sizes += ["train.micro_batch_size=2", "model.num_hidden_layers=3", "model.hidden_size=32", sink]
    return Plan(load_config("quickstart", [*sizes, *overrides]), world_size=1, tokenizer_size=300)


def make_model(plan: Plan) -> SinkGPTNeoXForCausalLM:
    torch.manual_seed(0)
    return SinkGPTNeoXForCausalLM(plan.model_config).double()


def make_samples(plan: Plan, num_samples: int = 2) -> Tensor:
    return torch.randint(300, (num_samples, plan.tokens_per_sample), generator=torch.Generator().manual_seed(1))


@given(num_sinks=st.integers(0, 3), length=st.sampled_from([4, 6, 8, 12, 24]))
def test_segments_cover_each_token_once_and_have_equal_positions(num_sinks, length):
    plan = make_plan(*WINDOW, f"train.segment_length={length}", num_sinks=num_sinks)
    bounds = list(segment_bounds(plan))
    assert len(bounds) == plan.num_segments == 24 // length
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == plan.tokens_per_sample - 1
    assert bounds[0][1] + num_sinks == length
    assert {stop - start for start, stop in bounds[1:]} <= {length}


@settings(max_examples=12)
@given(
    num_sinks=st.integers(0, 2),
    length=st.sampled_from([4, 8, 12, 24]),
    window=st.sampled_from([1, 3, 8, 11, 30]),
    kind=st.sampled_from(["token", "zero", "kv_bias"]),
    drawn=st.sampled_from([None, 1, 2, 7]),
)
def test_the_loss_equals_that_of_one_pass(num_sinks, length, window, kind, drawn):
    arm = [f"model.sink.kind={kind}"] if kind != "token" and num_sinks == 0 else []
    overrides = [*WINDOW, f"model.attention.window={window}", *arm]
    whole = make_plan(*overrides, num_sinks=num_sinks)
    parts = make_plan(*overrides, f"train.segment_length={length}", num_sinks=num_sinks)
    model, samples = make_model(whole), make_samples(whole)
    drawn = None if drawn is None else min(drawn, window)
    (expected,) = pass_losses(model, samples, samples, whole, window=drawn)
    found = list(pass_losses(model, samples, samples, parts, window=drawn))
    assert len(found) == 24 // length
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), abs=1e-10)


def test_samples_that_do_not_count_are_left_out_of_the_loss():
    plan = make_plan(*SEGMENTS)
    model, samples = make_model(plan), make_samples(plan)
    labels = torch.stack([samples[0], torch.full_like(samples[1], IGNORED)])
    alone = torch.stack(list(pass_losses(model, samples[:1], samples[:1], plan))).mean()
    both = torch.stack(list(pass_losses(model, samples, labels, plan, num_samples=1))).mean()
    assert both.item() == pytest.approx(alone.item(), abs=1e-10)


@contextmanager
def detached_before(model: SinkGPTNeoXForCausalLM, num_sinks: int, start: int) -> Iterator[None]:
    """Let no gradient flow through the keys and values of text positions before ``start``."""

    def detach(module: nn.Module, inputs: object, states: Tensor) -> Tensor:
        return torch.cat([states[:, :num_sinks], states[:, num_sinks:start].detach(), states[:, start:]], dim=1)

    with_hooks = [layer.attention.query_key_value.register_forward_hook(detach) for layer in model.gpt_neox.layers]
    yield
    for hook in with_hooks:
        hook.remove()


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize("window", [3, 11])
def test_gradients_end_at_the_borders_of_segments(num_sinks, window):
    """The reference is a pass over all that is before a segment's end, for the segment's loss."""
    plan = make_plan(*SEGMENTS, f"model.attention.window={window}", num_sinks=num_sinks)
    model, samples = make_model(plan), make_samples(plan)
    for loss in pass_losses(model, samples, samples, plan):
        (loss / plan.num_segments).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for start, stop in segment_bounds(plan):
        labels = samples[:, : stop + 1].clone()
        labels[:, : start + bool(start)] = IGNORED
        with detached_before(model, num_sinks, start + num_sinks):
            num_targets = torch.tensor(2.0 * plan.targets_per_sample)
            output = model(samples[:, :stop], labels=labels, num_items_in_batch=num_targets, skip_logits=True)
        output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-9, rtol=1e-9, msg=name)
    model.zero_grad(set_to_none=True)  # in one pass the gradient is another one
    next(pass_losses(model, samples, samples, make_plan(*WINDOW, num_sinks=num_sinks))).backward()
    assert not torch.allclose(found["gpt_neox.embed_in.weight"], model.gpt_neox.embed_in.weight.grad)


def test_activation_checkpointing_does_not_change_the_gradients():
    plan = make_plan(*SEGMENTS)
    plain, checkpointed = make_model(plan), make_model(plan)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    samples = make_samples(plan)
    for model in (plain, checkpointed):
        for loss in pass_losses(model.train(), samples, samples, plan):
            loss.backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def segmented_run(recipe, tmp_path_factory):
    """Eight steps of two micro-batches in four segments each, saved at 4 and 8."""
    run = tmp_path_factory.mktemp("segments") / "run"
    train(recipe, [f"train.run_dir={run}", *SEGMENTS, "train.micro_batch_size=4"])
    return run


def test_a_run_in_segments_is_a_loop_over_them(recipe, segmented_run):
    """The reference has neither DeepSpeed nor micro-batches."""
    plan = Plan(load_config(recipe, [*SEGMENTS, "train.micro_batch_size=8"]), 1, 300)
    torch.manual_seed(7)
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    optimizer = plain_optimizer(model, plan)
    expected, norms = [], []
    for step, samples in enumerate(itertools.islice(batches_of(plan), 8)):
        found = []
        for loss in pass_losses(model, samples, samples, plan):
            (loss / plan.num_segments).backward()
            found.append(loss.item())
        expected.append(sum(found) / len(found))
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), plan.config.optimizer.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 8, plan.config.optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert list(losses(segmented_run).values()) == pytest.approx(expected, abs=1e-5)
    assert [line["grad_norm"] for line in metrics(segmented_run) if "loss" in line] == pytest.approx(norms, rel=1e-4)


def test_the_validation_loss_equals_that_of_one_pass(recipe, segmented_run, tmp_path):
    copy_checkpoint(segmented_run, 8, tmp_path)
    begun = ["train.num_steps=9", "optimizer.lr=1e-30", "validation.every_steps=9"]
    train(recipe, [f"train.run_dir={tmp_path}", *WINDOW, *begun])
    found, expected = (
        [line["validation_loss"] for line in metrics(run) if "validation_loss" in line][-1]
        for run in (segmented_run, tmp_path)
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_run_in_segments_resumes_bit_for_bit(recipe, segmented_run, tmp_path):
    copy_checkpoint(segmented_run, 4, tmp_path)
    train(recipe, [f"train.run_dir={tmp_path}", *SEGMENTS, "train.micro_batch_size=4"])
    assert losses(tmp_path) == losses(segmented_run)
    assert_same_weights(weights(tmp_path, 8), weights(segmented_run, 8))


def test_every_shape_is_compiled_once_and_no_window_again():
    drawn = ["model.attention.window=[2,11]", "model.num_hidden_layers=1"]
    plan = make_plan(*SEGMENTS, *drawn)
    model, samples, counter = make_model(plan).float(), make_samples(plan), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    for window in (2, 11, 5):
        found = [loss.item() for loss in pass_losses(compiled, samples, samples, plan, window=window)]
        assert found == [loss.item() for loss in pass_losses(model, samples, samples, plan, window=window)]
    assert counter.frame_count == plan.num_pass_shapes == 3


def test_deepspeed_counts_every_pass():
    plan = make_plan(*SEGMENTS, "train.micro_batch_size=1")
    assert (plan.num_accumulation_steps, plan.num_segments, plan.num_passes) == (2, 3, 6)
    assert deepspeed_config(plan)["gradient_accumulation_steps"] == 6


def test_the_estimate_of_memory_is_that_of_a_segment():
    def activations(*overrides: str) -> float:
        plan = make_plan("model.hidden_size=128", *WINDOW, *overrides)
        return estimate_memory(plan.config, plan.model_config, zero_stage=1, world_size=1).activations

    longer = ["train.seq_length=48", "train.batch_size_tokens=96"]
    assert activations(*SEGMENTS[2:]) == activations(*SEGMENTS[2:], *longer) < activations() < activations(*longer)
