"""Muon against torch's, on whole matrices and on partitions, and in runs of the tiny recipe."""

import math
import re
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.config import SINK_KINDS
from sinklm.train.engine import make_engine, make_optimizer, parameter_groups
from sinklm.train.launch import connected
from sinklm.train.matrix_partition import MatrixPartition
from sinklm.train.memory import count_muon_parameters, estimate_memory
from sinklm.train.muon import LARGEST_BATCH, Muon, Shape, orthogonalize_
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.universal import add_second_moments

from ..checkpoints.seal import seal
from .plain import plain_orthogonal
from .tiny import assert_same_weights, copy_checkpoint, losses, weights

MUON = "optimizer.name=muon"
GOLDEN = [
    *(6.080961, 5.999202, 5.797347, 5.629008, 5.350029),
    *(5.035364, 4.761281, 4.439058, 4.154242, 4.032707),
    *(3.896397, 3.805241, 3.821462, 3.742123, 3.738788),
    *(3.654399, 3.594812, 3.598565, 3.585669, 3.648166),
]
TOLERANCE = 1e-5  # as in `test_golden`


def plan_of(recipe: str, *overrides: str) -> Plan:
    return Plan(load_config(recipe, [MUON, *overrides]), 1, 300)


# -- the update ------------------------------------------------------------------------------------


def make(shapes: list[tuple[int, int]], num_heads: list[int | None], dtype=torch.float64) -> Muon:
    """Muon for random matrices, and AdamW for a vector."""
    chance = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=chance)) for shape in shapes]
    vector = {"params": [nn.Parameter(torch.randn(5, generator=chance))], "weight_decay": 0.0}
    return Muon({"params": matrices, "weight_decay": 0.1}, num_heads, [vector], dtype=dtype, lr=0.02, fused=True)


def give_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=chance)


def test_it_is_torchs_muon_with_the_size_of_adamws_updates():
    ours = make([(8, 24), (24, 8), (8, 8), (8, 24)], [None] * 4, torch.bfloat16)
    twins = [nn.Parameter(p.detach().clone()) for p in ours.param_groups[0]["params"]]
    theirs = torch.optim.Muon(twins, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, step)
            optimizer.step()
    for weight, twin in zip(ours.param_groups[0]["params"], twins, strict=True):
        torch.testing.assert_close(weight, twin, atol=0.02 * 4 * 0.2 * 0.05, rtol=0)  # bfloat16: 5 % of the updates


def test_query_key_and_value_are_separate_matrices():
    """The rows of head 0's query, key and value come first, then those of head 1."""
    fused = torch.randn(24, 8, dtype=torch.float64)
    apart = fused.view(2, 3, 4, 8)
    expected = torch.empty_like(apart)
    for part in range(3):
        rows = apart[:, part].reshape(8, 8)
        expected[:, part] = (0.2 * math.sqrt(8) * plain_orthogonal(rows)).view(2, 4, 8)
    update = fused.clone()
    orthogonalize_([update], [Shape(24, 8, num_heads=2)], torch.float64)
    torch.testing.assert_close(update, expected.view(24, 8))
    as_one = fused.clone()
    orthogonalize_([as_one], [Shape(24, 8)], torch.float64)
    assert (as_one - update).abs().max() > 0.1


@pytest.mark.parametrize("largest", [1, LARGEST_BATCH])
def test_batches_change_no_matrix(monkeypatch, largest):
    monkeypatch.setattr("sinklm.train.muon.LARGEST_BATCH", largest)
    shapes = [(8, 24), (24, 8), (8, 8), (12, 4), (8, 24), (24, 8), (4, 24)]
    updates = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = [plain_orthogonal(update) * 0.2 * math.sqrt(max(update.shape)) for update in updates]
    orthogonalize_(updates, [Shape(*shape) for shape in shapes], torch.float64)
    for update, reference in zip(updates, expected, strict=True):
        torch.testing.assert_close(update, reference)


def test_the_update_has_the_size_of_adamws_and_a_zero_gradient_gives_none():
    optimizer = make([(64, 64), (64, 128), (32, 32)], [None] * 3)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    give_gradients(optimizer, 0)
    optimizer.param_groups[0]["params"][2].grad = None
    optimizer.step()
    for weight, old in zip(optimizer.param_groups[0]["params"][:2], before, strict=False):
        update = (old * (1 - 0.02 * 0.1) - weight).detach() / 0.02
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)
    torch.testing.assert_close(optimizer.param_groups[0]["params"][2].detach(), before[2] * (1 - 0.02 * 0.1))


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_a_step_that_is_held_back_changes_nothing(value):
    optimizer = make([(8, 24), (24, 8)], [None, 1])
    optimizer.found_inf = torch.zeros(())
    give_gradients(optimizer, 0)
    optimizer.step()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    state = [v.clone() for p in parameters for v in optimizer.state[p].values()]
    give_gradients(optimizer, 1)
    for parameter in parameters:
        parameter.grad *= value
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, (v for p in parameters for v in optimizer.state[p].values()), state))
    assert state[0].item() == 1.0


def test_gradients_are_divided_by_their_scale():
    plain, scaled = make([(8, 24)], [None]), make([(8, 24)], [None])
    for step in range(2):
        for optimizer in (plain, scaled):
            give_gradients(optimizer, step)
        for parameter in (p for group in scaled.param_groups for p in group["params"]):
            parameter.grad *= 8.0
        scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.zeros(())
        plain.step()
        scaled.step()
    for one, other in zip(plain.param_groups, scaled.param_groups, strict=True):
        assert torch.equal(one["params"][0], other["params"][0])


# -- partitions ------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 3))
def test_every_rank_gets_whole_matrices_and_writes_its_pieces_back(sizes, num_ranks, padding):
    part_size = -(-sum(sizes) // num_ranks) + padding
    flat = torch.zeros(part_size * num_ranks)
    flat[: sum(sizes)] = torch.arange(1.0, sum(sizes) + 1)
    parts = list(flat.clone().split(part_size))
    ranks = [MatrixPartition(sizes, part_size, rank, num_ranks) for rank in range(num_ranks)]
    sent = [rank.messages(part) for rank, part in zip(ranks, parts, strict=True)]
    assert sum(rank.num_elements for rank in ranks) == sum(sizes)
    ranges = list(pairwise(accumulate(sizes, initial=0)))
    for number, (rank, part) in enumerate(zip(ranks, parts, strict=True)):
        wholes = rank.assemble(part, [messages[number] for messages in sent])
        for index, whole in zip(rank.indices, wholes, strict=True):
            start, stop = ranges[index]
            assert torch.equal(whole, flat[start:stop])
            whole.neg_()
        rank.write_back(part, wholes)
    assert torch.equal(torch.cat(parts), -flat)
    held = [i for rank in ranks for i in rank.indices]
    assert set(held) == set(range(len(sizes)))


def test_a_partition_in_another_order_is_refused(recipe):
    with connected() as world:
        plan = plan_of(recipe)
        engine = make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
        engine.basic_optimizer.check_partition()
        engine.basic_optimizer._weights.reverse()
        engine.basic_optimizer._shapes.reverse()
        engine.basic_optimizer._partition = None
        with pytest.raises(ValueError, match=r"optimizer\.name=muon needs the matrices in DeepSpeed's partition one"):
            engine.basic_optimizer.check_partition()


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_muon_updates_the_matrices_of_layers_and_no_sinks(recipe, kind):
    plan = plan_of(recipe, f"model.sink.kind={kind}")
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    hidden, matrices, others = make_optimizer(model, plan.config).param_groups
    linear = [m.weight for m in model.gpt_neox.layers.modules() if isinstance(m, nn.Linear)]
    assert {id(p) for p in hidden["params"]} == {id(p) for p in linear}
    assert {id(p) for p in matrices["params"]} == {id(model.lm_head.weight), id(model.gpt_neox.embed_in.weight)}
    assert [group["weight_decay"] for group in (hidden, matrices, others)] == [0.1, 0.1, 0.0]
    assert sum(p.numel() for p in linear) == count_muon_parameters(plan.config, plan.model_config)
    names = [name for group in parameter_groups(model, plan.config.optimizer) for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_the_golden_curve(recipe, tmp_path, caplog):
    """See `test_golden`."""
    overrides = [MUON, "train.num_steps=20", "validation.every_steps=null", "checkpoint.every_steps=null"]
    train(recipe, [*overrides, f"train.run_dir={tmp_path}"])
    assert list(losses(tmp_path).values()) == pytest.approx(GOLDEN, abs=TOLERANCE)
    assert "untested optimizer" not in caplog.text


def test_the_converter_gets_a_second_moment_of_muons_matrices_alone():
    optimizer = make([(8, 24), (24, 8)], [None, None])
    give_gradients(optimizer, 0)
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][2]["exp_avg_sq"]  # of a damaged checkpoint
    add_second_moments(state)
    assert [sorted(moments) for moments in state["state"].values()] == [
        *(["exp_avg", "exp_avg_sq", "step"],) * 2,
        ["exp_avg", "step"],
    ]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(recipe, tmp_path, stage):
    """Past two further saves. `test_spikes` has ZeRO-1, and `test_distributed` two ranks."""
    often = [MUON, f"deepspeed.zero_stage={stage}", "checkpoint.every_steps=2", "checkpoint.keep=null"]
    train(recipe, [*often, f"train.run_dir={tmp_path / 'whole'}"])
    copy_checkpoint(tmp_path / "whole", 2, tmp_path / "resumed")
    train(recipe, [*often, f"train.run_dir={tmp_path / 'resumed'}"])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert_same_weights(weights(tmp_path / "resumed", 8), weights(tmp_path / "whole", 8))
    if stage == 0:  # `test_distributed` has the conversions that need DeepSpeed's converter
        copy_checkpoint(tmp_path / "whole", 4, tmp_path / "converted")
        train(recipe, [MUON, "deepspeed.zero_stage=2", f"train.run_dir={tmp_path / 'converted'}"])
        expected = pytest.approx(list(losses(tmp_path / "whole").values()), abs=1e-5)
        assert list(losses(tmp_path / "converted").values()) == expected


@pytest.mark.parametrize(("before", "now"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_does_not_resume_the_run_but_begins_with_its_weights(
    recipe, whole_run, muon_run, tmp_path, before, now
):
    run, other = tmp_path / "the run", [f"optimizer.name={now}"]
    copy_checkpoint(muon_run if before == "muon" else whole_run, 4, run)
    message = rf"optimizer\.name is '{now}', but .*step-4 was trained with '{before}': restore that value, or start a "
    message += r"new run with another train\.run_dir and (model\.init_from=.*) to begin with its weights"
    with pytest.raises(ValueError, match=message) as refused:
        train(recipe, [*other, f"train.run_dir={run}"])
    remedy = re.search(message, str(refused.value))[1]
    train(recipe, [*other, f"train.run_dir={tmp_path / 'new'}", remedy, "optimizer.lr=1e-9", "train.num_steps=2"])
    for name, weight in weights(tmp_path / "new", 2).items():
        torch.testing.assert_close(weight, weights(run, 4)[name], atol=1e-6, rtol=0)


def test_a_checkpoint_from_before_there_was_muon_resumes(recipe, whole_run, tmp_path):
    copy_checkpoint(whole_run, 4, tmp_path)
    path = tmp_path / "checkpoints" / "step-4" / "config.yaml"
    saved = OmegaConf.load(path)
    del saved.optimizer.name
    path.write_text(OmegaConf.to_yaml(saved))
    seal(path.parent)
    with pytest.raises(ValueError, match=r"optimizer\.name is 'muon', but .*step-4 was trained with 'adamw'"):
        train(recipe, [MUON, f"train.run_dir={tmp_path}"])
    train(recipe, [f"train.run_dir={tmp_path}"])
    assert losses(tmp_path) == losses(whole_run)


@pytest.mark.parametrize(
    "key",
    [
        "zero_stage=3",
        "zero_allow_untested_optimizer=false",
        "zero_optimization.offload_optimizer={device: cpu}",
        "zero_optimization.cpu_offload=true",
        "zero_optimization.zenflow={topk_ratio: 0.1}",
        "zero_optimization.zenflow={}",
        "zero_optimization.elastic_checkpoint=true",
        "zero_optimization.parameter_alignment=true",
    ],
)
def test_what_moves_or_cuts_its_state_otherwise_is_refused(recipe, key):
    name = re.escape(key.partition("=")[0])
    with pytest.raises(ValueError, match=rf"^optimizer\.name=muon does not work with deepspeed\.{name}\S*: change one"):
        load_config(recipe, [MUON, f"deepspeed.{key}"])
    load_config(recipe, [f"deepspeed.{key}"])


@pytest.mark.parametrize(
    "setting",
    [
        "offload_optimizer={device: none}",
        "offload_optimizer={pin_memory: true}",
        "offload_optimizer=null",
        "cpu_offload=false",
        "zenflow=null",
        "elastic_checkpoint='false'",
        "parameter_alignment=0",
    ],
)
def test_what_deepspeed_reads_as_off_is_not_refused(recipe, setting):
    load_config(recipe, [MUON, f"deepspeed.zero_optimization.{setting}"])


def test_the_state_is_smaller_and_the_run_says_so(recipe, capsys):
    adamw, muon = (Plan(load_config(recipe, [f"optimizer.name={name}"]), 1, 300) for name in ("adamw", "muon"))
    num_muon = count_muon_parameters(muon.config, muon.model_config)
    for stage, ranks in ((0, 1), (1, 1), (1, 8), (2, 8)):
        states = [
            estimate_memory(plan.config, plan.model_config, zero_stage=stage, world_size=ranks).states
            for plan in (adamw, muon)
        ]
        assert states[0] - states[1] == pytest.approx(4 * num_muon / ranks)
    train(recipe, [MUON], only_describe=True)
    assert f"Muon for {num_muon:,} parameters, AdamW for " in capsys.readouterr().out
