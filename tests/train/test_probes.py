"""What is measured in training, and that measuring changes nothing."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter

from sinklm.checkpoints import load_model
from sinklm.data import TokenStore, TokenWindows
from sinklm.eval.losses import streaming_losses
from sinklm.eval.sinks import measure
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.config import SINK_KINDS
from sinklm.train.plan import Plan
from sinklm.train.probes import Probes
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.twin import evaluation_twin

from .tiny import assert_same_weights, losses, metrics, weights

PROBES = ["validation.streaming_tokens=150", "validation.sample_tokens=8", "validation.sink_rate=true"]
KEYS = {
    *("streaming_loss", "streaming_perplexity", "streaming_cache", "num_streaming_tokens"),
    *("sample", "sample_prompt", "sink_rate", "attention_mass"),
}
PATHS = [
    ["deepspeed.zero_stage=1", "train.precision=bf16"],
    ["deepspeed.zero_stage=3", "train.precision=bf16"],
]


def probed(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line.keys() & KEYS} for line in metrics(run_dir) if "validation_loss" in line]


def check_same_run(plain: Path, measured: Path) -> None:
    assert losses(measured) == losses(plain)
    assert_same_weights(weights(measured, 8), weights(plain, 8))
    assert all(line.keys() == KEYS for line in probed(measured))
    assert not any(probed(plain))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_measuring_does_not_change_the_run_and_measures_the_checkpoint(recipe, store, tmp_path, path):
    for name, more in (("plain", []), ("measured", PROBES)):
        train(recipe, [f"train.run_dir={tmp_path / name}", *path, *more])
    check_same_run(tmp_path / "plain", tmp_path / "measured")

    stream = TokenStore(store).split("validation")
    for step, found in zip((4, 8), probed(tmp_path / "measured"), strict=True):
        model = load_model(tmp_path / "measured" / "checkpoints" / f"step-{step}")
        ids = torch.from_numpy(stream.read(0, 150))
        expected = streaming_losses(model, ids, 1, 30)[1:].mean().item()
        assert found["streaming_loss"] == pytest.approx(expected, rel=1e-3)
        assert found["streaming_perplexity"] == pytest.approx(math.exp(found["streaming_loss"]))
        assert (found["streaming_cache"], found["num_streaming_tokens"]) == ("1+30", 150)
        assert found["sample_prompt"] == Tokenizer.from_file(str(store / "tokenizer.json")).decode(ids[:32].tolist())
        assert found["sample"]


def small_plan(store: Path, kind: str, *more: str) -> Plan:
    """A plan whose model has weights large enough for sinks."""
    settings = [f"data.path={store}", f"model.sink.kind={kind}", "train.seq_length=64", "train.batch_size_tokens=64"]
    return Plan(load_config("quickstart", [*settings, "train.micro_batch_size=1", *PROBES, *more]), 1, 300)


def probes_of(store: Path, plan: Plan) -> tuple[Probes, TokenWindows]:
    opened = TokenStore(store)
    windows = TokenWindows(opened, "validation", tokens_per_sample=plan.tokens_per_sample, stride=plan.stride)
    return Probes(plan, SimpleNamespace(mark=lambda _: None), opened, windows), windows  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [(), ("model.attention.pattern=1:1", "model.attention.window=7")])
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_sinks_are_those_of_the_evaluation(store, kind, more):
    plan = small_plan(store, kind, *more)
    torch.manual_seed(3)
    model = SinkGPTNeoXForCausalLM(plan.model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    probes, windows = probes_of(store, plan)
    found = probes.measure(SimpleNamespace(module=model))  # type: ignore[arg-type]
    num_text = 64 - plan.num_sinks
    ids = torch.stack([torch.from_numpy(windows[i][:num_text]) for i in range(min(16, len(windows)))])
    expected = measure(model, ids)
    for name, values in (("sink_rate", expected.sink_rate), ("attention_mass", expected.mass)):
        assert found[name]["first_text_token"] == pytest.approx(float(values[..., plan.num_sinks].mean()), abs=1e-4)
        assert found[name]["no_token"] == pytest.approx(float(values[..., -1].mean()), abs=1e-4)
        if plan.num_sinks:
            assert found[name]["sink_token"] == pytest.approx(float(values[..., 0].mean()), abs=1e-4)
    assert ("sink_token" in found["sink_rate"]) == bool(plan.num_sinks)
    assert sum(found["sink_rate"].values()) > 0


def test_the_training_graph_is_not_compiled_again(store):
    plan = small_plan(store, "token", "model.num_hidden_layers=1")
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    counter = CompileCounter()
    model.compile(backend=counter, dynamic=False)
    probes, _ = probes_of(store, plan)
    counts = []
    for _ in range(2):
        model(
            input_ids=torch.zeros(1, 63, dtype=torch.long), labels=torch.zeros(1, 63, dtype=torch.long), use_cache=False
        )
        counts.append(counter.frame_count)
        before = torch.get_rng_state()
        first = probes.measure(SimpleNamespace(module=model))  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), before)
    assert counts[0] == counts[1] > 0
    assert first == probes.measure(SimpleNamespace(module=model))  # type: ignore[arg-type]


def test_the_twin_shares_the_weights(store):
    plan = small_plan(store, "token")
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    twin = evaluation_twin(SimpleNamespace(module=model), plan)  # type: ignore[arg-type]
    for name, parameter in twin.named_parameters():
        assert parameter.data_ptr() == model.get_parameter(name).data_ptr(), name
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation != "eager"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ["validation.streaming_tokens=1000000"],
            r"validation\.streaming_tokens is 1000000, but the validation split of",
        ),
        (["validation.every_steps=null", "validation.sink_rate=true"], "sink_rate is set, but every_steps is null"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(recipe, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, [f"train.run_dir={tmp_path}", *override])
