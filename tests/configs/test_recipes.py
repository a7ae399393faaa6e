"""Every packaged recipe loads and matches its source."""

import json
from pathlib import Path

import pytest
import torch

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.cost import count_parameters, flops_per_token
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config, recipe_names
from sinklm.train.summary import dry_run

PYTHIA_TOKENIZER_SIZE = 50277
# Parameters and learning rates of the released models (EleutherAI/pythia, models/*/pythia-*.yml).
PYTHIA = {
    "14m": (14_067_712, 1e-3),
    "31m": (30_494_720, 1e-3),
    "70m": (70_426_624, 1e-3),
    "160m": (162_322_944, 6e-4),
    "410m": (405_334_016, 3e-4),
    "1b": (1_011_781_632, 2.5e-4),
    "1.4b": (1_414_647_808, 2e-4),
    "2.8b": (2_775_208_960, 1.6e-4),
    "6.9b": (6_857_302_016, 1.2e-4),
    "12b": (11_846_072_320, 1.2e-4),
}
DRAWN = ["model.attention.pattern=window", "model.attention.window=[32,2047]"]
# Recipes that differ from `paper/vanilla` by their sink, and its number of parameters in 12 layers
# of width 768.
ARMS = {
    "paper/learnable-sink": ("token", 0),
    "paper/two-sinks": ("token", 0),
    "paper/zero-sink": ("zero", 0),
    "arms/logit": ("logit", 12 * 12),
    "arms/kv-bias": ("kv_bias", 12 * 2 * 768),
    "arms/gate": ("gate", 12 * 768 * 768),
    "arms/head-gate": ("head_gate", 12 * 12 * 768),
}
STUDY = {
    "study/learnable-sink": ("token", 1),
    "study/two-sinks": ("token", 2),
    "study/zero-sink": ("zero", 1),
    "study/logit": ("logit", 1),
    "study/kv-bias": ("kv_bias", 1),
    "study/gate": ("gate", 1),
    "study/head-gate": ("head_gate", 1),
}
DRAWN_TO_ALL = ["model.attention.pattern=window", "model.attention.window=[32,4095]"]
# Recipes that differ from `windows/full` by these settings alone.
WINDOWS = {
    "windows/fixed-255": ["model.attention.pattern=window", "model.attention.window=255"],
    "windows/fixed-1023": ["model.attention.pattern=window", "model.attention.window=1023"],
    "windows/drawn": DRAWN,
    "windows/drawn-none": [*DRAWN, "model.sink.kind=none"],
    "windows/drawn-zero": [*DRAWN, "model.sink.kind=zero"],
    "windows/drawn-logit": [*DRAWN, "model.sink.kind=logit"],
    "windows/drawn-4095": DRAWN_TO_ALL,
    "windows/continued": [
        *(*DRAWN_TO_ALL, "model.init_from=windows/runs/full", "optimizer.lr=1e-3", "train.num_steps=800"),
        *("validation.every_steps=200", "checkpoint.every_steps=200"),
    ],
    "windows/hybrid": ["model.attention.pattern=3:1", "model.attention.window=255"],
    "windows/segments": [
        *("model.attention.pattern=window", "model.attention.window=1023"),
        "train.segment_length=1024",
    ],
}
# Recipes that also exist with frozen weights: the recipe of the model that they continue, and their
# positions.
RETROFITS = {"retrofit/study": ("study/vanilla", 33e6), "retrofit/pythia-160m": ("pythia-160m", 131e6)}
STUDY_TOKENIZER_SIZE = 4000
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


def plan_of(name: str, *overrides: str, tokenizer_size: int = PYTHIA_TOKENIZER_SIZE) -> Plan:
    return Plan(load_config(name, overrides), world_size=1, tokenizer_size=tokenizer_size)


def test_the_recipes_are_these():
    others = {"quickstart", "continue/pythia-160m", "paper/vanilla", *ARMS, "study/vanilla", *STUDY}
    others |= {"recall/learnable-sink", "recall/vanilla", "recall/drawn"}
    windows = {"windows/full", *WINDOWS, "windows/pythia-160m", "windows/continue-160m"}
    muon = {"muon/vanilla", "muon/learnable-sink"}
    muon |= RETROFITS.keys() | {f"{name}-frozen" for name in RETROFITS}
    assert set(recipe_names()) == others | windows | muon | {f"pythia-{size}" for size in PYTHIA}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_can_be_trained_on_one_rank(name, monkeypatch, capsys):
    monkeypatch.chdir(CHECKPOINTS.parents[1])  # where the initial weights of `retrofit/study` are
    of_study = name.startswith("retrofit/study")
    overrides = ["model.init_from=null"] if name == "windows/continued" else []  # a run of the user
    plan = plan_of(name, *overrides, tokenizer_size=STUDY_TOKENIZER_SIZE if of_study else PYTHIA_TOKENIZER_SIZE)
    assert plan.num_accumulation_steps >= 1
    dry_run(plan.config)
    assert f"{count_parameters(plan.model_config):,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("size", PYTHIA)
def test_a_pythia_has_the_published_size_and_schedule(size):
    num_parameters, lr = PYTHIA[size]
    plan = plan_of(f"pythia-{size}")
    with torch.device("meta"):
        model = SinkGPTNeoXForCausalLM(plan.model_config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert count_parameters(plan.model_config) == num_parameters
    assert plan.config.optimizer.lr == lr
    assert plan.samples_per_step == 1024
    assert plan.num_positions == 143_000 * 2_097_152
    assert (plan.num_sinks, plan.model_config.sink_token_ids) == (1, [PYTHIA_TOKENIZER_SIZE])


def test_vanilla_is_the_papers():
    vanilla = load_config("paper/vanilla")
    assert vanilla.train.batch_size_tokens == 256 * 2048
    assert vanilla.train.num_steps == 143_000
    assert vanilla.model.sink.kind == "none"


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_differs_from_vanilla_by_its_sink_alone(name):
    kind, num_more = ARMS[name]
    vanilla, arm = (load_config(recipe).model_dump() for recipe in ("paper/vanilla", name))
    assert arm["model"].pop("sink") == {"kind": kind, "num_tokens": 2 if name == "paper/two-sinks" else 1}
    del vanilla["model"]["sink"]
    for config in (vanilla, arm):
        del config["train"]["run_dir"]
    assert vanilla == arm

    model_config = plan_of(name).model_config
    with torch.device("meta"):
        model = SinkGPTNeoXForCausalLM(model_config)
    assert sum(p.numel() for p in model.parameters()) == PYTHIA["160m"][0] + num_more
    assert count_parameters(model_config) == PYTHIA["160m"][0] + num_more


@pytest.mark.parametrize("name", STUDY)
def test_an_arm_of_the_study_differs_from_its_vanilla_by_its_sink_alone(name):
    kind, num_tokens = STUDY[name]
    vanilla, arm = (load_config(recipe).model_dump() for recipe in ("study/vanilla", name))
    assert arm["model"].pop("sink") == {"kind": kind, "num_tokens": num_tokens}
    assert vanilla["model"].pop("sink")["kind"] == "none"
    for config in (vanilla, arm):
        del config["train"]["run_dir"]
    assert vanilla == arm


@pytest.mark.parametrize("name", WINDOWS)
def test_a_recipe_of_the_windows_differs_from_full_attention_by_its_name_alone(name):
    found, expected = load_config(name).model_dump(), load_config("windows/full", WINDOWS[name]).model_dump()
    for config in (found, expected):
        del config["train"]["run_dir"]
    assert found == expected


@pytest.mark.parametrize("name", RETROFITS)
def test_a_retrofit_goes_on_at_a_constant_rate(name):
    """The rate is at most that at which the pre-training ended: that of the study is lower."""
    plan = plan_of(name)
    pretraining, num_positions = RETROFITS[name]
    before, now = load_config(pretraining).optimizer, plan.config.optimizer
    last = before.lr * before.min_lr_ratio
    assert now.lr == (5e-4 if name == "retrofit/study" else pytest.approx(last))
    assert now.lr <= last * 1.001
    assert now.min_lr_ratio == 1
    assert plan.num_positions == pytest.approx(num_positions, rel=0.01)
    assert plan.num_sinks == 1
    assert plan.config.model.init_from is not None


@pytest.mark.parametrize("name", RETROFITS)
def test_a_frozen_retrofit_differs_by_what_it_trains_alone(name):
    frozen, trained = load_config(f"{name}-frozen"), load_config(name)
    same = ["train.only_sinks=true", "deepspeed.zero_stage=0", f"optimizer.lr={frozen.optimizer.lr}"]
    same += [f"train.run_dir={frozen.train.run_dir}", "optimizer.weight_decay=0.0"]
    assert frozen == load_config(name, same) != trained
    assert frozen.optimizer.lr > trained.optimizer.lr


def test_windows_of_the_160m():
    assert plan_of("windows/pythia-160m").model_config.layer_windows == 12 * [1023]
    plan = plan_of("windows/continue-160m")
    assert (plan.model_config.window_range, plan.num_sinks) == ([32, 1023], 1)
    assert plan.config.model.init_from == "EleutherAI/pythia-160m"


@pytest.mark.parametrize("name", ["vanilla", "learnable-sink"])
def test_a_recipe_with_muon_differs_from_the_study_by_its_optimizer_alone(name):
    muon, adamw = (
        load_config(f"{folder}/{name}", ["train.run_dir=runs/a"]).model_dump() for folder in ("muon", "study")
    )
    assert (muon["optimizer"].pop("name"), adamw["optimizer"].pop("name")) == ("muon", "adamw")
    assert muon == adamw


def test_the_study_matches_the_shipped_models():
    config = load_config("study/vanilla")
    assert (config.train.num_steps, config.train.batch_size_tokens, config.train.seq_length) == (17631, 32768, 256)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train.seed) == (1.6e-2, 0.25, 1234)
    for name in ("vanilla", "learnable-sink"):
        shipped = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))
        plan = plan_of(f"study/{name}", tokenizer_size=STUDY_TOKENIZER_SIZE).model_config
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"):
            assert shipped[key] == getattr(plan, key)


def test_two_models_of_the_study_are_small_enough_to_ship():
    plans = [plan_of(name, tokenizer_size=STUDY_TOKENIZER_SIZE) for name in ("study/vanilla", "study/learnable-sink")]
    assert [plan.vocab_size for plan in plans] == [4096, 4096]
    assert sum(2 * count_parameters(plan.model_config) for plan in plans) < 22e6  # bytes in bfloat16


def test_the_models_of_recall_differ_by_their_sink_and_are_small_enough_to_ship():
    sink, vanilla = (load_config(f"recall/{name}").model_dump() for name in ("learnable-sink", "vanilla"))
    assert (sink["model"].pop("sink")["kind"], vanilla["model"].pop("sink")["kind"]) == ("token", "none")
    for config in (sink, vanilla):
        del config["train"]["run_dir"]
    assert sink == vanilla
    assert sink["data"]["weights"] == {"recall": 1, "text": 1}
    drawn = load_config("recall/drawn").model_dump()
    assert drawn["model"]["attention"].pop("window") == [256, 1023]
    assert drawn["model"]["attention"]["pattern"] == "window"
    assert all(drawn[section] == sink[section] for section in ("data", "optimizer", "validation"))
    plan = plan_of("recall/learnable-sink", tokenizer_size=4095)
    assert plan.model_config.vocab_size == 4096
    assert 2 * count_parameters(plan.model_config) < 25e6  # bytes in bfloat16


def test_an_arm_reads_as_many_positions_with_any_number_of_sinks():
    none, one, two = (
        plan_of("paper/learnable-sink", f"model.sink.{key}") for key in ("kind=none", "num_tokens=1", "num_tokens=2")
    )
    assert [p.tokens_per_sample for p in (none, one, two)] == [2049, 2048, 2047]
    assert [p.targets_per_sample for p in (none, one, two)] == [2048, 2048, 2047]
    assert [p.stride for p in (none, one, two)] == [2048, 2048, 2047]


def test_operations_per_token_of_the_160m():
    # 6 × (parameters without the input embedding) + 12 × layers × width × positions
    expected = 6 * (162_322_944 - 50304 * 768) + 12 * 12 * 768 * 2048
    assert flops_per_token(plan_of("pythia-160m").model_config, 2048) == expected
