"""The fused update against DeepSpeed's own, on one rank and on two."""

import math
import sys

import pytest
import torch
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import engine as engine_module
from sinklm.train.engine import make_engine
from sinklm.train.fused_update import FusedUpdate, has_fused_update
from sinklm.train.launch import World, connected
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config

from .tiny import Ranks

NUM_STEPS, NUM_MICRO_BATCHES = 4, 2


def plan_of(recipe: str, world_size: int) -> Plan:
    batch = NUM_MICRO_BATCHES * world_size * 2 * 32
    overrides = ["train.precision=bf16", f"train.batch_size_tokens={batch}", "optimizer.clip=0.5"]
    return Plan(load_config(recipe, overrides), world_size, 300)


def trained(plan: Plan, world: World, *, is_fused: bool) -> tuple[list[torch.Tensor], list[float]]:
    """This rank's float32 weights, and the norms, after steps on gradients that do not depend on the weights.

    So what differs is the update alone: how gradients are added up, reduced, measured and clipped, and how AdamW takes
    them.
    """
    chance = torch.Generator().manual_seed(world.rank)
    engine_module.has_fused_update = has_fused_update if is_fused else lambda _: False
    try:
        torch.manual_seed(0)
        engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    finally:
        engine_module.has_fused_update = has_fused_update
    assert isinstance(getattr(engine, "fused_update", None), FusedUpdate) == is_fused
    norms = []
    for step in range(NUM_STEPS):
        for _ in range(NUM_MICRO_BATCHES):
            tokens = torch.zeros(2, 32, dtype=torch.int64)
            used = engine(input_ids=tokens, labels=tokens, skip_logits=True, use_cache=False).loss * 0.0
            scale = (0.01, 10.0)[step % 2]  # below the clip, and above it
            for parameter in engine.module.parameters():
                noise = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
                used = used + (parameter * noise * (scale / math.sqrt(parameter.numel()))).sum()
            engine.backward(used)
            engine.step()
        norms.append(engine.fused_update.read_grad_norm() if is_fused else float(engine.get_global_grad_norm()))
    zero = engine.optimizer
    for flat, own in zip(zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition, strict=True):
        assert torch.equal(flat[world.rank].float(), own.to(torch.bfloat16).float())  # the model got the new weights
    return [own.detach().clone() for own in zero.fp32_groups_flat_partition], norms


def compare(recipe: str, world: World) -> None:
    """Equal but for the bfloat16 to which DeepSpeed rounds the gradient before it reduces it."""
    plan = plan_of(recipe, world.size)
    lr = plan.config.optimizer.lr
    own, own_norms = trained(plan, world, is_fused=True)
    theirs, their_norms = trained(plan, world, is_fused=False)
    assert own_norms == pytest.approx(their_norms, rel=1e-3)
    assert min(own_norms) < plan.config.optimizer.clip < max(own_norms)
    for ours, reference in zip(own, theirs, strict=True):
        off = (ours - reference).abs() / lr  # AdamW moves a weight by about lr a step
        assert off.mean() < 0.005
        # Where gradients of two ranks cancel, what DeepSpeed's rounding leaves can be anything.
        assert (off > 0.05).float().mean() < (0.01 if world.size > 1 else 1e-9)


def test_on_one_rank(recipe):
    with connected() as world:
        compare(recipe, world)


@pytest.mark.slow
def test_on_two_ranks(recipe):
    for status, output in Ranks(["-m", "tests.train.test_fused_update", recipe], world_size=2).wait():
        assert status == 0, output


def test_a_deepspeed_without_the_names_it_needs_updates_by_itself(recipe, monkeypatch):
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    with connected() as world:
        plan = plan_of(recipe, 1)
        engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
        assert has_fused_update(engine)
        monkeypatch.delattr(BF16_Optimizer, "update_lp_params")
        with pytest.warns(RuntimeWarning, match=r"no BF16_Optimizer\.update_lp_params, as 0\.19\.8 had"):
            assert not has_fused_update(engine)


if __name__ == "__main__":
    with connected() as joined:
        compare(sys.argv[1], joined)
