"""The fused update against DeepSpeed's, and its kernel against torch's AdamW."""

import math

import pytest
import torch
import torch.distributed as dist

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import deepspeed_patches, fused_update
from sinklm.train.engine import make_engine
from sinklm.train.fused_update import FusedUpdate
from sinklm.train.launch import World, connected
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config

from .plain import plain_adamw_, play_kernel
from .processes import Ranks

NUM_STEPS = 4


def plan_of(recipe: str, world_size: int, num_micro_batches: int = 2, *more: str) -> Plan:
    batch = num_micro_batches * world_size * 2 * 32
    overrides = [f"train.batch_size_tokens={batch}", "train.micro_batch_size=2"]
    overrides += ["train.precision=bf16", "optimizer.clip=0.5", *more]
    return Plan(load_config(recipe, overrides), world_size, 300)


def trained(plan: Plan, world: World) -> tuple[list[torch.Tensor], list[float]]:
    """This rank's float32 weights and the norms, on gradients independent of the weights.

    The results therefore depend only on the update: how gradients are summed, reduced and clipped,
    and on AdamW.
    """
    chance = torch.Generator().manual_seed(world.rank)
    is_fused = plan.config.deepspeed.patches
    torch.manual_seed(0)
    engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
    assert isinstance(engine.fused_update, FusedUpdate) == is_fused
    norms = []
    for step in range(NUM_STEPS):
        for _ in range(plan.num_accumulation_steps):
            tokens = torch.zeros(2, 32, dtype=torch.int64)
            used = engine(input_ids=tokens, labels=tokens, skip_logits=True, use_cache=False).loss * 0.0
            scale = (0.01, 10.0)[step % 2]  # below the clip, and above it
            for parameter in engine.module.parameters():
                noise = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
                used = used + (parameter * noise * (scale / math.sqrt(parameter.numel()))).sum()
            engine.backward(used)
            engine.step()
        norms.append(engine.fused_update.grad_norm.read() if is_fused else float(engine.get_global_grad_norm()))
    zero = engine.optimizer
    for flat, own in zip(zero.bf16_groups_flat, zero.fp32_groups_flat_partition, strict=True):
        parts = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(parts, own.detach())
        assert torch.equal(flat, torch.cat(parts).to(torch.bfloat16))  # the model got the new weights of all ranks
    return [own.detach().clone() for own in zero.fp32_groups_flat_partition], norms


def compare(recipe: str, world: World, num_micro_batches: int, *more: str) -> None:
    """Equal except for DeepSpeed's rounding of the gradient to bfloat16 before the reduction."""
    plan = plan_of(recipe, world.size, num_micro_batches, *more)
    lr = plan.config.optimizer.lr
    own, own_norms = trained(plan, world)
    unpatched = plan_of(recipe, world.size, num_micro_batches, "deepspeed.patches=false", *more)
    theirs, their_norms = trained(unpatched, world)
    assert own_norms == pytest.approx(their_norms, rel=1e-3)
    assert min(own_norms) < plan.config.optimizer.clip < max(own_norms)
    for ours, reference in zip(own, theirs, strict=True):
        off = (ours - reference).abs() / lr  # a step changes a weight by about lr, with Muon 0.2 lr
        assert off.mean() < (0.01 if plan.config.optimizer.name == "muon" else 0.005)  # Muon amplifies rounding
        # Where the gradients of two ranks cancel, DeepSpeed's rounding leaves an arbitrary value.
        assert (off > 0.05).float().mean() < (0.01 if world.size > 1 else 1e-9)


@pytest.mark.parametrize(("num_micro_batches", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_on_one_rank(recipe, num_micro_batches, optimizer, update_kernel):
    with connected() as world:
        compare(recipe, world, num_micro_batches, f"optimizer.name={optimizer}")


def compare_as_rank(recipe: str) -> None:
    with connected() as world:
        for number in (1, 2):
            compare(recipe, world, number)
        play_kernel()
        for number in (1, 2):
            compare(recipe, world, number)
        compare(recipe, world, 2, "optimizer.name=muon")


@pytest.mark.slow
def test_on_two_ranks(recipe):
    """Without the kernel, and then with it."""
    for status, output in Ranks(compare_as_rank, recipe, world_size=2).wait():
        assert status == 0, output


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_weights", [5, 100_000])
def test_the_kernel_on_a_gpu(num_weights, dtype):
    ours, theirs = ([torch.ones(num_weights, device="cuda")] for _ in range(2))
    for tensors in (ours, theirs):
        tensors.append(torch.zeros(num_weights, device="cuda", dtype=torch.bfloat16))
        tensors.extend([torch.zeros(num_weights, device="cuda") for _ in range(2)] + [torch.zeros((), device="cuda")])
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for found_inf in (1.0, 0.0, 0.0, 1.0, 0.0):
        gradient = torch.randn(num_weights, device="cuda").to(dtype) / (1 - found_inf)
        gradient[::3], gradient[1::3] = 0, gradient[1::3] * 1e-8  # where eps counts
        scalars = {"grad_scale": torch.rand((), device="cuda") + 1, "found_inf": torch.full((), found_inf).cuda()}
        before = [value.clone() for value in ours]
        for adamw_, (weights, copy, *state) in ((fused_update.kernel.adamw_, ours), (plain_adamw_, theirs)):
            adamw_(weights, copy, gradient, *state, **settings, **scalars)
        weights, copy, _, exp_avg_sq, _ = ours
        if found_inf:
            assert all(map(torch.equal, ours, before))
            continue  # the torch version copies in any case
        assert torch.equal(copy, weights.to(torch.bfloat16))
        for value, twin in zip(ours, theirs, strict=True):
            atol = 0 if value is exp_avg_sq else 1e-6
            torch.testing.assert_close(value, twin, rtol=1e-2 if value is copy else 1e-5, atol=atol)


def test_a_deepspeed_without_the_required_names_is_not_patched(recipe, monkeypatch):
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    with connected() as world:
        plan = plan_of(recipe, 1)
        engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
        assert engine.fused_update is not None
        monkeypatch.delattr(BF16_Optimizer, "update_lp_params")
        with pytest.warns(RuntimeWarning, match=r"no BF16_Optimizer\.update_lp_params, which 0\.19\.8 has"):
            assert deepspeed_patches.fused_update(engine, plan.config) is None
