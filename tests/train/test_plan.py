"""Derived values: batches, vocabulary, memory, operations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.cost import flops_per_token
from sinklm.train.memory import estimate_memory
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config


def plan(*overrides: str, world_size: int = 1, tokenizer_size: int = 300) -> Plan:
    return Plan(load_config("quickstart", overrides), world_size, tokenizer_size)


@given(num_samples=st.integers(1, 200), micro_batch_size=st.integers(1, 50), world_size=st.integers(1, 20))
def test_a_batch_is_divided_exactly_or_the_error_has_a_fix(num_samples, micro_batch_size, world_size):
    sizes = [f"train.batch_size_tokens={num_samples * 256}", f"train.micro_batch_size={micro_batch_size}"]
    if num_samples % (world_size * micro_batch_size) == 0:
        accepted = plan(*sizes, world_size=world_size)
        assert accepted.num_accumulation_steps * micro_batch_size * world_size == num_samples
        return
    with pytest.raises(ValueError, match=r"set train\.") as refused:
        plan(*sizes, world_size=world_size)
    advice = str(refused.value)
    if "train.micro_batch_size=" in advice:  # following the advice helps
        advised = int(advice.rpartition("=")[2])
        assert advised <= micro_batch_size  # a larger one may not fit into memory
        plan(sizes[0], f"train.micro_batch_size={advised}", world_size=world_size)


@pytest.mark.parametrize(("tokenizer_size", "num_sinks", "expected"), [(256, 0, 256), (256, 1, 384), (254, 2, 256)])
def test_the_vocabulary_holds_tokenizer_and_sinks(tokenizer_size, num_sinks, expected):
    sink = ["model.sink.kind=none"] if num_sinks == 0 else [f"model.sink.num_tokens={num_sinks}"]
    derived = plan(*sink, tokenizer_size=tokenizer_size)
    assert derived.vocab_size == derived.model_config.vocab_size == expected
    assert derived.model_config.sink_token_ids == list(range(tokenizer_size, tokenizer_size + num_sinks))


def test_the_model_is_that_of_the_recipe():
    sizes = ["model.hidden_size=96", "model.num_hidden_layers=3", "model.num_attention_heads=6"]
    rotary = ["model.rotary_pct=0.5", "model.rope_theta=500", "model.parallel_residual=false"]
    windows = ["model.attention.pattern=2:1", "model.attention.window=[4,20]", "model.attention.num_kept=3"]
    sink = ["model.sink.num_tokens=2", "model.vocab_size=400"]
    overrides = [*sizes, *rotary, *windows, *sink]
    found = Plan(load_config("quickstart", overrides), 1, 300, eod_id=7).model_config
    assert (found.hidden_size, found.num_hidden_layers, found.num_attention_heads) == (96, 3, 6)
    assert (found.rope_parameters["rope_theta"], found.rope_parameters["partial_rotary_factor"]) == (500, 0.5)
    assert (found.layer_windows, found.num_kept, found.window_range) == ([20, 20, None], 3, [4, 20])
    assert (found.vocab_size, found.sink_token_ids) == (400, [300, 301])
    assert (found.bos_token_id, found.eos_token_id) == (7, 7)
    assert not found.use_parallel_residual
    assert not found.tie_word_embeddings
    assert (found.intermediate_size, found.max_position_embeddings) == (4 * 96, 256)
    named = plan(*overrides, "model.intermediate_size=100", "model.max_position_embeddings=512").model_config
    assert (named.intermediate_size, named.max_position_embeddings) == (100, 512)
    assert plan("model.parallel_residual=true", "model.sink.kind=gate").model_config.use_parallel_residual


def test_a_vocabulary_without_room_for_the_sink_is_refused():
    plan("model.vocab_size=301")
    with pytest.raises(
        ValueError,
        match=r"model\.vocab_size 300 is too small for a tokenizer of 300 ids and 1 sink token: set it to 301",
    ):
        plan("model.vocab_size=300")
    plan("model.vocab_size=300", "model.sink.kind=none")


@pytest.mark.parametrize("kind", ["none", "kv_bias", "gate", "head_gate"])
def test_the_estimate_of_operations_equals_torchs_count(kind):
    sizes = plan(
        f"model.sink.kind={kind}", "train.seq_length=64", "train.batch_size_tokens=64", "train.micro_batch_size=1"
    )
    model = SinkGPTNeoXForCausalLM(sizes.model_config)
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    # torch counts only matrix products; the formula also counts biases and layer norms
    assert counter.get_total_flops() / 64 == pytest.approx(flops_per_token(sizes.model_config, 64), rel=0.01)


def test_memory_is_split_by_zero():
    sizes = plan("train.precision=bf16")
    states = {
        (stage, ranks): estimate_memory(sizes.config, sizes.model_config, zero_stage=stage, world_size=ranks).states
        for stage in range(4)
        for ranks in (1, 64)
    }
    per_parameter = states[0, 1] / 16
    assert states[0, 1] == states[0, 64]
    assert states[1, 1] == states[2, 1] == states[3, 1] == 20 * per_parameter
    assert states[1, 64] > states[2, 64] > states[3, 64]


def test_checkpointing_saves_activations():
    full, checkpointed = (
        estimate_memory(p.config, p.model_config, zero_stage=1, world_size=1).activations
        for p in (plan(), plan("train.activation_checkpointing=true"))
    )
    assert checkpointed < full
