"""A training step on one rank equals a plain loop, and stops at non-finite values."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.config import SINK_KINDS
from sinklm.train import engine as engine_module
from sinklm.train import step as step_module
from sinklm.train.engine import deepspeed_config, make_engine
from sinklm.train.launch import World, connected
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.step import train_step

from .plain import plain_training
from .tiny import bad_loss_in, losses, metrics, weights

MUON = "optimizer.name=muon"
OFFLOAD = "deepspeed.zero_optimization.offload_optimizer.device=cpu"


def plan_of(recipe: str, *overrides: str) -> Plan:
    return Plan(load_config(recipe, overrides), 1, 300)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with connected() as world:
        yield world


@pytest.mark.parametrize(
    "overrides",
    [
        ["deepspeed.zero_stage=0"],
        ["deepspeed.zero_stage=1", "train.micro_batch_size=4"],
        ["deepspeed.zero_stage=2", "model.sink.num_tokens=3"],
        ["deepspeed.zero_stage=3", "model.sink.kind=none"],
        ["deepspeed.zero_stage=1", "model.sink.kind=gate"],
        ["deepspeed.zero_stage=3", "model.sink.kind=kv_bias"],
        ["deepspeed.zero_stage=1", "train.activation_checkpointing=true", "optimizer.clip=0.1"],
        ["deepspeed.zero_stage=2", OFFLOAD],
        ["deepspeed.zero_stage=0", MUON, "model.sink.kind=gate"],
        ["deepspeed.zero_stage=1", MUON],
        ["deepspeed.zero_stage=2", MUON, "train.micro_batch_size=4"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_training_equals_a_plain_loop(recipe, tmp_path, overrides):
    overrides = [*overrides, f"train.run_dir={tmp_path}", "validation.every_steps=null", "checkpoint.every_steps=null"]
    train(recipe, overrides)
    plan = plan_of(recipe, *overrides)
    expected_losses, expected_norms, model = plain_training(plan, 8)
    assert list(losses(tmp_path).values()) == pytest.approx(expected_losses, abs=2e-5)
    assert [line["grad_norm"] for line in metrics(tmp_path)] == pytest.approx(expected_norms, rel=1e-4)
    saved = weights(tmp_path, 8)
    for name, parameter in model.named_parameters():
        if "query_key_value.bias" in name:
            continue  # the gradient of a key's bias is only rounding error, which AdamW normalizes to full size
        on_disk = saved["embed_out.weight" if name == "lm_head.weight" else name]
        torch.testing.assert_close(on_disk, parameter.detach(), atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_accumulate_in_float32(recipe, world, stage, update_kernel):
    """A sum of 32 micro-batches in bfloat16 would lose values below 1/256 of it."""
    norms = {}
    for num_micro_batches in (1, 32):  # of the same sample: the mean of equal gradients is that gradient
        plan = plan_of(
            recipe,
            f"deepspeed.zero_stage={stage}",
            "train.precision=bf16",
            "train.micro_batch_size=1",
            f"train.batch_size_tokens={num_micro_batches * 32}",
        )
        torch.manual_seed(0)
        engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
        batches = iter([torch.arange(32)[None]] * num_micro_batches)
        norms[num_micro_batches] = train_step(engine, batches, plan, world, step=1, lr=0.0).result().grad_norm
    assert norms[32] == pytest.approx(norms[1], rel=2e-4)


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        *product([0, 1, 2, 3], ["fp32", "bf16"], ["adamw"]),
        *((stage, precision, "muon") for stage, precision in [(0, "fp32"), (1, "bf16"), (2, "bf16")]),
    ],
)
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    recipe, world, monkeypatch, stage, precision, optimizer, update_kernel
):
    plan = plan_of(
        recipe, f"deepspeed.zero_stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}"
    )
    engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    batches = iter(torch.randint(0, 300, (100, 2, 32)))
    train_step(engine, batches, plan, world, step=1, lr=0.1)
    before = {name: _value(p) for name, p in engine.module.named_parameters()}

    backward = type(engine).backward
    monkeypatch.setattr(type(engine), "backward", lambda self, loss, **kw: backward(self, loss * math.inf, **kw))
    with pytest.raises(ValueError, match="step 7: the gradient is not finite"):
        train_step(engine, batches, plan, world, step=7, lr=0.1).result()
    monkeypatch.undo()
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(_value(parameter), before[name]), name


def _value(parameter: torch.Tensor) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update_with_step_and_rank(recipe, world, monkeypatch, stage, value):
    """Even if its gradient is finite: here a constant is added to the loss."""
    plan = plan_of(recipe, f"deepspeed.zero_stage={stage}")
    engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    forward = engine.module.forward

    def diverging(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.loss = output.loss + value
        return output

    monkeypatch.setattr(engine.module, "forward", diverging)
    batches = iter(torch.randint(0, 300, (100, 2, 32)))
    before = [_value(p) for p in engine.module.parameters()]
    with pytest.raises(
        ValueError, match=rf"step 3: the loss is {value} on rank 0\. Training stopped before the update"
    ):
        train_step(engine, batches, plan, world, step=3, lr=0.1).result()
    assert all(torch.equal(_value(p), b) for p, b in zip(engine.module.parameters(), before, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_disables_the_steps_queued_after_it(recipe, world, optimizer, update_kernel):
    plan = plan_of(recipe, "train.precision=bf16", f"optimizer.name={optimizer}")
    engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    batches = iter(torch.randint(0, 300, (100, 2, 32)))
    before = [_value(p) for p in engine.module.parameters()]
    with bad_loss_in(1, plan.num_accumulation_steps):
        pending = [train_step(engine, batches, plan, world, step=step, lr=0.1) for step in (1, 2)]
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        pending[0].result()
    assert all(torch.equal(_value(p), b) for p, b in zip(engine.module.parameters(), before, strict=True))


def test_the_rank_is_named():
    with pytest.raises(ValueError, match="step 3: the loss is nan on rank 1, inf on rank 2"):
        step_module._check_losses([2.0, math.nan, math.inf], 3)


def test_the_run_ends_with_the_message_and_saves_nothing(recipe, tmp_path, monkeypatch):
    forward = SinkGPTNeoXForCausalLM.forward

    def diverging(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(SinkGPTNeoXForCausalLM, "forward", diverging)
    with pytest.raises(ValueError, match="step 1: the loss is nan on rank 0"):
        train(recipe, [f"train.run_dir={tmp_path}"])
    assert not Path(tmp_path, "checkpoints").exists()


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_weight_decay_is_on_matrices_alone(recipe, kind):
    plan = plan_of(recipe, f"model.sink.kind={kind}")
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    decayed, others = engine_module.make_optimizer(model, plan.config).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in matrices}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_odd_sinks_push_no_other_weights_out_of_alignment(recipe, world):
    """`sink_logit` has one number per head, here two; biases after it would not be aligned."""
    plan = plan_of(recipe, "model.sink.kind=logit", "train.precision=bf16", "deepspeed.zero_stage=1")
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    make_engine(model, plan, world.device)
    askew = {name.split(".")[-1] for name, p in model.named_parameters() if p.data_ptr() % 16}
    assert askew == {"sink_logit"}


def test_extra_deepspeed_keys_are_passed_through_and_merged(recipe):
    plan = plan_of(recipe, "deepspeed.zero_optimization.overlap_comm=true", "deepspeed.wall_clock_breakdown=true")
    theirs = deepspeed_config(plan)
    assert theirs["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert theirs["wall_clock_breakdown"] is True
    assert theirs["gradient_accumulation_steps"] == 2


def test_nothing_of_an_earlier_run_stays_in_the_process(recipe, world):
    """DeepSpeed replaces functions in torch, which a later, compiled run must not use."""
    for stage in (3, 1):
        plan = plan_of(recipe, f"deepspeed.zero_stage={stage}")
        make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    assert torch.nn.functional.linear is torch._C._nn.linear


def test_a_key_that_deepspeed_rejects_is_named(recipe, world):
    plan = plan_of(recipe, "deepspeed.zero_optimization.overlap=true")
    with pytest.raises(ValueError, match=r"rejects keys of the section deepspeed \(DeepSpeedZeroConfig\).*: overlap: "):
        make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)


@pytest.mark.parametrize(
    ("precision", "stage", "key"),
    [("bf16", 0, "torch_autocast"), ("bf16", 1, "bf16"), ("fp16", 3, "fp16"), ("fp16", 0, "torch_autocast")],
)
def test_precision_by_stage(recipe, precision, stage, key):
    theirs = deepspeed_config(plan_of(recipe, f"train.precision={precision}", f"deepspeed.zero_stage={stage}"))
    assert theirs[key]["enabled"] is True
    assert {"bf16", "fp16", "torch_autocast"} & theirs.keys() == {key}


def test_a_compiler_that_is_missing_ends_the_run_with_the_remedy(recipe, tmp_path):
    told = r"^rank 0: torch.compile and Triton found no C or C\+\+ compiler: .*; train.compile=false trains without"
    without = inductor.patch({"cpp.cxx": (None, "/nonexistent/g++")})
    with fresh_cache(), without, pytest.raises(ValueError, match=told):
        train(recipe, ["train.compile=true", f"train.run_dir={tmp_path}"])
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.long
def test_a_second_run_takes_the_traced_model_from_the_cache(recipe, tmp_path):
    found = []
    with fresh_cache():
        for name in ("cold", "warm"):
            torch._dynamo.reset()
            counters.clear()
            train(recipe, ["train.compile=true", "train.num_steps=1", f"train.run_dir={tmp_path / name}"])
            found.append(
                {kind: counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in ("bypass", "miss", "hit")}
            )
    torch._dynamo.reset()
    cold, warm = found
    assert cold["miss"] == warm["hit"] > 0
    assert cold["bypass"] == warm["bypass"] == warm["miss"] == 0
    assert losses(tmp_path / "cold") == losses(tmp_path / "warm")


def test_the_cache_of_traced_models_has_a_key_of_their_code(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module.models, "__file__", str(tmp_path / "__init__.py"))
    keys = []
    with torch.compiler.config.patch(cache_key_tag="a tag of the user"):
        for code in ("a = 1", "a = 1", "a = 2"):
            (tmp_path / "__init__.py").write_text(code)
            engine_module.cache_traced_models()
            keys.append(torch.compiler.config.cache_key_tag)
    assert keys[0] == keys[1] != keys[2]
    assert all(key.startswith("a tag of the user sinklm ") for key in keys)
