"""Attention sinks: statistics against explicit loops, and models of many families."""

import math
import sys
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoConfig, AutoModelForCausalLM

from sinklm.eval.sinks import Layer, measure, observe, statistics
from sinklm.eval.sinks.plots import heads_figure
from sinklm.eval.sinks.tables import as_json, massive_table, named_positions, positions_table, shown_positions
from sinklm.models.cache_argument import CACHE
from sinklm.streaming.attention_mass import attention_mass, visible_keys
from sinklm.streaming.rule import StreamShape
from sinklm.streaming.testing import random_model

from ..models.tiny import plain_twin, text, tiny_arm, tiny_model
from ..models.tiny import sinks as sink_ids
from ..streaming import small_families
from ..streaming import tiny as families

EPSILON = 0.15  # for random attention, so that rates are neither 0 nor 1


# -- reference: one number at a time, from weights and residual stream -----------------------------


def rotated(states: list[float], position: int, num_dims: int, theta: float) -> list[float]:
    """Rotate the first ``num_dims``: each dimension of the first half with one of the second."""
    half = num_dims // 2
    turned = list(states)
    for j in range(half):
        angle = position * theta ** (-2 * j / num_dims)
        a, b = states[j], states[half + j]
        turned[j], turned[half + j] = (
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        )
    return turned


def projections(model, layer: int, states: torch.Tensor):
    """Unrotated queries, keys and values ``[head][position]`` from the states ``(T, D)``."""
    config, block = model.config, model.base_model.layers[layer]
    normed = block.input_layernorm(states)
    if config.model_type == "gpt_neox":  # query, key and value of a head are adjacent
        parts = block.attention.query_key_value(normed).view(len(states), config.num_attention_heads, 3, -1)
        return tuple(parts[:, :, i].transpose(0, 1).tolist() for i in range(3))
    attention = block.self_attn
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple(
        projection(normed).view(len(states), count, -1).transpose(0, 1).tolist()
        for projection, count in zip(layers, counts, strict=True)
    )


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a) -> float:
    return math.sqrt(dot(a, a))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
def by_hand(model, ids: torch.Tensor, epsilon: float) -> dict[str, torch.Tensor]:
    """Every statistic of ``ids`` ``(N, T)`` in a GPT-NeoX or Llama; see `statistics.Statistics`."""
    config, num_positions = model.config, ids.shape[1]
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    shapes = {"mass": (num_heads, num_positions + 1), "sink_rate": (num_heads, num_positions + 1)}
    shapes |= {"maps": (num_heads, num_positions, num_positions), "median_activation": ()}
    by_position = ["hidden_norm", "key_norm", "value_norm", "key_cosine", "query_cosine", "query_key_cosine"]
    shapes |= dict.fromkeys([*by_position, "largest_activation"], (num_positions,))
    sums = {name: torch.zeros(num_layers, *shape, dtype=torch.float64) for name, shape in shapes.items()}

    for row, layer in product(ids, range(num_layers)):
        states = model(row[None], output_hidden_states=True).hidden_states[layer][0]
        queries, keys, values = projections(model, layer, states)
        head_dim = len(queries[0][0])
        rope = config.rope_parameters
        rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0)), rope["rope_theta"]
        queries, keys = (
            [[rotated(vector, t, *rotary) for t, vector in enumerate(head)] for head in states]
            for states in (queries, keys)
        )
        group = num_heads // len(keys)
        for head in range(num_heads):
            columns = [0.0] * num_positions
            for i in range(num_positions):
                scores = [dot(queries[head][i], keys[head // group][k]) / math.sqrt(head_dim) for k in range(i + 1)]
                weights = [math.exp(score - max(scores)) for score in scores]
                for k, weight in enumerate(weights):
                    share = weight / sum(weights)
                    sums["maps"][layer, head, i, k] += share
                    columns[k] += share
            for k, column in enumerate(columns):
                alpha = column / (num_positions - k)
                sums["mass"][layer, head, k] += alpha
                sums["sink_rate"][layer, head, k] += alpha > epsilon
        for t in range(num_positions):
            hidden = states[t].tolist()
            sums["hidden_norm"][layer, t] += norm(hidden)
            sums["largest_activation"][layer, t] += max(abs(h) for h in hidden)
            sums["key_norm"][layer, t] += mean(norm(head[t]) for head in keys)
            sums["value_norm"][layer, t] += mean(norm(head[t]) for head in values)
            sums["key_cosine"][layer, t] += mean(dot(k[t], k[0]) / norm(k[t]) / norm(k[0]) for k in keys)
            cosines = [
                [dot(q[i], keys[h // group][t]) / norm(q[i]) / norm(keys[h // group][t]) for i in range(num_positions)]
                for h, q in enumerate(queries)
            ]
            sums["query_key_cosine"][layer, t] += mean(mean(head[t:]) for head in cosines)
            if t == 0:
                sums["query_cosine"][layer] += torch.tensor(cosines, dtype=torch.float64).mean(0)
        magnitudes = sorted(abs(h) for h in states.flatten().tolist())
        sums["median_activation"][layer] += magnitudes[(len(magnitudes) - 1) // 2]
    return {name: total / len(ids) for name, total in sums.items()}


def assert_equals_loops(measured, expected) -> None:
    for name, values in expected.items():
        # transformers' rotary tables are float32 even in float64 models
        torch.testing.assert_close(
            getattr(measured, name), values, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert 0 < float(measured.sink_rate.mean()) < 1


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_statistics_of_gpt_neox_are_those_of_explicit_loops(num_sinks, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH_ENTRIES", 2 * 2 * 4 * 9**2)  # two sequences at a time, of three
    model, ids = tiny_model(num_sinks, hidden_size=64), text(3, 9 - num_sinks)
    expected = by_hand(plain_twin(model), torch.cat([sink_ids(model, 3), ids], dim=1), EPSILON)
    assert_equals_loops(measure(model, ids, epsilon=EPSILON), expected)


def test_statistics_of_grouped_heads_are_those_of_explicit_loops():
    model = families.build(families.config("llama"))
    ids = families.random_ids(8, batch_size=2)
    assert_equals_loops(measure(model, ids, epsilon=EPSILON), by_hand(model, ids, EPSILON))


# -- constructed attention maps --------------------------------------------------------------------


def obedient_model(num_sinks: int = 1):
    """One layer in which one key dimension marks sink tokens, and every query attends to it."""
    model = tiny_model(num_sinks, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    attention, embedding = model.gpt_neox.layers[0].attention, model.gpt_neox.embed_in
    is_sink = torch.zeros(embedding.num_embeddings, dtype=torch.bool)
    is_sink[model.config.sink_token_ids] = True
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[:, 0] = torch.where(is_sink, 1.0, -1.0)
        embedding.weight[:, 1] = -embedding.weight[:, 0]  # so that the layer norm does not change it
        attention.query_key_value.weight.zero_()
        attention.query_key_value.bias.zero_()
        for query in (0, 12):  # rows of each head: 4 of the query, the key, the value; the last is not rotated
            attention.query_key_value.bias[query + 3] = 1
            attention.query_key_value.weight[query + 4 + 3, 0] = 400
    return model


def test_a_head_that_attends_only_to_the_sink_has_rate_1():
    measured = measure(obedient_model(), text(3, 10), epsilon=0.999)
    expected = torch.zeros(1, 2, 12, dtype=torch.float64)
    expected[..., 0] = 1
    assert torch.equal(measured.sink_rate, expected)
    torch.testing.assert_close(measured.mass, expected, rtol=0, atol=1e-12)


def test_two_equal_sinks_share_the_attention():
    mass = measure(obedient_model(2), text(2, 8)).mass
    queries = range(1, 11)  # the first sink's query attends only to itself
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor(sum(1 / min(i, 2) for i in queries) / 10).double())
    torch.testing.assert_close(mass[0, 0, 1:3], torch.tensor([0.5, 0.0]).double())


@pytest.mark.parametrize(("logit", "share"), [(50.0, 1.0), (-50.0, 0.0)])
def test_attention_to_no_token_is_the_rest_of_each_row(logit, share):
    """gpt-oss learns a logit for each head that belongs to no token."""
    small = {"num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("gpt_oss", **families.COMMON | small)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(logit)
    measured = measure(model, families.random_ids(10, batch_size=2))
    torch.testing.assert_close(measured.mass[..., -1], torch.full((2, 4), share).double(), rtol=0, atol=1e-5)
    assert torch.equal(measured.sink_rate[..., -1], torch.full((2, 4), share).double())
    report = {"epsilon": 0.3, **as_json(measured, named_positions(0, 0))}
    names = list(shown_positions(report))
    assert names == ["first text token", "no token"][: 1 + int(share)]
    assert len(heads_figure(report).axes) == 2 * len(names) + 1
    assert len(positions_table(report, "").rows) == 3 + len(names)


@st.composite
def attention_maps(draw) -> tuple[torch.Tensor, StreamShape | None]:
    """Maps ``(2, T, T)`` with rows that sum to 1 or less, and the window of their layer or None."""
    size, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = draw(st.floats(0, 8)) * torch.randn(2, size, size + 1, generator=generator, dtype=torch.float64)
    scores[..., 0] += draw(st.sampled_from([-math.inf, 0.0, 5.0]))  # a column that belongs to no token
    rule = draw(st.none() | st.builds(StreamShape, st.integers(0, 3), st.integers(1, 5)))
    scores[..., 1:].masked_fill_(~torch.tensor(seen_keys(size, rule)), -math.inf)
    return scores.softmax(-1)[..., 1:], rule


def seen_keys(size: int, rule: StreamShape | None) -> list[list[bool]]:
    """Return which keys each query sees."""
    return [
        [k <= q and (rule is None or k < rule.num_kept or q - k <= rule.window) for k in range(size)]
        for q in range(size)
    ]


@given(attention_maps())
def test_masses_add_up_to_the_attention(attention_and_rule):
    attention, rule = attention_and_rule
    size = attention.shape[-1]
    mass = attention_mass(attention, visible_keys(size, rule, attention.device))
    assert mass.shape == (2, size + 1)
    assert ((mass > -1e-12) & (mass < 1 + 1e-12)).all()
    num_queries = torch.tensor([*map(sum, zip(*seen_keys(size, rule), strict=True)), size])  # to none: all
    torch.testing.assert_close((mass * num_queries).sum(-1), torch.full((2,), size).double())


@given(attention_maps(), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_gives_more_sinks(attention_and_rule, a, b):
    attention, rule = attention_and_rule
    states = torch.ones(1, 2, attention.shape[-1], 4, dtype=torch.float64)
    layer = Layer(states[:, 0], states, states, states, attention[None], rule)
    low, high = (statistics.of_layer(layer, epsilon)["sink_rate"] for epsilon in sorted((a, b)))
    assert (low >= high).all()


# -- massive activations ---------------------------------------------------------------------------


def test_activations_are_massive_by_size_and_by_ratio():
    states = torch.full((3, 5, 8), 0.125)
    states[0, 1, 3] = -150.0
    states[0, 2, 4] = 100.0  # 800 times the median, and not over 100
    states[1] *= 8
    states[1, 0, 3] = 999.0  # the median is 1
    states[2] = 0.0
    states[2, 4, 5] = 99.0
    assert statistics.find_massive(states) == [(1, 3, -150.0, 1200.0)]
    states[1, 0, 3] = 1000.0
    states[2, 4, 5] = 101.0  # the median is 0
    first, second, third = statistics.find_massive(states.bfloat16())
    assert (first, second) == ((1, 3, -150.0, 1200.0), (0, 3, 1000.0, 1000.0))
    assert third[:3] == (4, 5, 101.0)
    assert math.isfinite(third[3])


def test_massive_activations_are_counted_over_sequences(monkeypatch):
    monkeypatch.setattr(statistics, "BATCH_ENTRIES", 1)
    model, ids = tiny_model(1), text(4, 6)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[model.config.sink_token_ids[0], 7] = -2000
        model.gpt_neox.embed_in.weight[ids[0, 0], 5] = 3000
    ids[1:][ids[1:] == ids[0, 0]] = ids[0, 1]  # once only
    measured = measure(model, ids)
    found = {(a.layer, a.position, a.dimension): (a.share, a.value) for a in measured.massive_activations}
    assert {place: found[place] for place in found if place[0] == 0} == {(0, 0, 7): (1, -2000), (0, 1, 5): (0.25, 3000)}
    median = float(measured.median_activation[0])
    sink = next(a for a in measured.massive_activations if (a.layer, a.position) == (0, 0))
    assert sink.ratio == pytest.approx(2000 / median, rel=0.2)  # a mean of ratios, not a ratio of means
    table = massive_table({"massive_activations": [vars(a) for a in measured.massive_activations]})
    assert list(table.columns[1].cells)[:2] == ["7", "5"]


def test_the_table_shows_ranges_of_layers():
    facts = {"position": 0, "dimension": 7, "share": 1.0, "value": 200.0, "ratio": 2000.0}
    table = massive_table({"massive_activations": [facts | {"layer": layer} for layer in (5, 3, 4, 9, 12, 11)]})
    assert list(table.columns[2].cells) == ["3–5, 9, 11–12"]


# -- real models -----------------------------------------------------------------------------------

OTHERS: dict[str, dict] = {
    "gpt2": {"vocab_size": families.VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "bloom": {"vocab_size": families.VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 4},
    "opt": {
        "vocab_size": families.VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 48,
    },
    "starcoder2": families.COMMON | families.GROUPED | {"sliding_window": 5},
}


@pytest.mark.parametrize("kind", ["zero", "logit", "kv_bias", "gate", "head_gate"])
def test_an_arm_has_queries_and_attention_to_no_token(kind):
    model = tiny_arm(kind, torch.float32)
    for layer in observe(model, text(2, 12)):
        assert layer.queries is not None
        spent = layer.attention.sum(-1)
        assert bool((spent < 0.999).any()) == ("gate" not in kind)


@pytest.mark.parametrize("kind", ["none", "logit"])
def test_maps_of_windowed_layers_show_the_window_and_the_kept_tokens(kind):
    model, ids = tiny_arm(kind, layer_windows=[3, None], num_kept=2), text(2, 12)
    with torch.no_grad():
        hidden_states = model(ids, output_hidden_states=True).hidden_states
    windowed, full = observe(model, ids)
    query, key = torch.arange(12)[:, None], torch.arange(12)
    visible = (key <= query) & ((key >= query - 3) | (key < 2))
    assert torch.equal((windowed.attention > 0).any((0, 1)), visible)
    assert torch.equal((full.attention > 0).any((0, 1)), key <= query)
    torch.testing.assert_close(full.hidden_states, hidden_states[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*(name for name in families.FAMILIES if name != "falcon:rw"), *OTHERS])
def test_what_is_observed_is_what_the_model_does(name):
    """Keys of layer 2 depend on the attention of layer 1, computed here by other kernels."""
    config = AutoConfig.for_model(name, **OTHERS[name]) if name in OTHERS else families.config(name)
    model, ids = families.build(config, dtype=torch.float32), families.random_ids(12, batch_size=2)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]

    layers = observe(model, ids)

    assert model.config._attn_implementation == implementation
    assert len(layers) == 2
    window = getattr(config, "sliding_window", None) or 12
    for layer, cached in zip(layers, cache.layers, strict=True):
        num_cached = cached.keys.shape[2]
        torch.testing.assert_close(layer.keys[:, :, -num_cached:], cached.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.values[:, :, -num_cached:], cached.values, rtol=1e-3, atol=1e-4)
        assert layer.attention.shape == (2, 4, 12, 12)
        assert layer.hidden_states.shape == (2, 12, 48)
        assert layer.keys.shape[2] == layer.values.shape[2] == 12
        assert not layer.attention.triu(1).any()
        torch.testing.assert_close(layer.attention.sum(-1), torch.ones(2, 4, 12))
        if num_cached < 12:
            assert not layer.attention.tril(-window).any()
        if layer.queries is not None and name in families.FAMILIES:
            group = 4 // layer.keys.shape[1]
            scaling = getattr(config, "query_pre_attn_scalar", layer.keys.shape[-1]) ** -0.5
            scores = layer.queries @ layer.keys.repeat_interleave(group, 1).mT * scaling
            is_hidden = ~torch.tensor(seen_keys(12, layer.rule))
            torch.testing.assert_close(scores.masked_fill(is_hidden, -math.inf).softmax(-1), layer.attention)
    has_queries = layers[0].queries is not None
    module = sys.modules[type(model).__module__]
    assert has_queries == hasattr(module, "eager_attention_forward")  # otherwise it does not use AttentionInterface
    assert has_queries or config.model_type in ("gptj", "mpt", "falcon", "bloom")
    assert measure(model, ids).query_cosine.isfinite().all() == has_queries


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "gemma4_text"])
def test_keys_are_those_that_queries_meet_and_not_those_of_the_cache(name):
    """DeepSeek's cache compresses them, and layers of Gemma 4 use those of other layers."""
    model = random_model(small_families.config(name))
    ids = families.random_ids(9, batch_size=2)
    for block, layer in zip(model.model.layers, observe(model, ids), strict=True):
        attention = block.self_attn
        keys = layer.keys.repeat_interleave(layer.queries.shape[1] // layer.keys.shape[1], dim=1)
        is_hidden = ~torch.tensor(seen_keys(9, layer.rule))
        scores = (layer.queries @ keys.mT * attention.scaling).masked_fill(is_hidden, -math.inf)
        torch.testing.assert_close(scores.softmax(-1), layer.attention)
        assert layer.values.shape[-1] == getattr(attention, "v_head_dim", layer.keys.shape[-1])
    assert measure(model, ids).query_cosine.isfinite().all()


def test_models_without_right_maps_are_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="'mamba' are not supported: they do not return an attention map"):
        observe(model, families.random_ids(4))
    with pytest.raises(ValueError, match="Falcon-RW is not supported: transformers adds its ALiBi biases twice"):
        observe(families.build(families.config("falcon:rw")), families.random_ids(4))
    with pytest.raises(ValueError, match="'gemma3n_text' are not supported: they have several residual streams"):
        observe(random_model(small_families.config("gemma3n_text")), families.random_ids(4))


def test_sequences_longer_than_the_model_are_refused():
    with pytest.raises(ValueError, match="--seq-length 130 is more than the model's 128 positions"):
        measure(tiny_model(2), text(1, 128))


def test_sums_in_bfloat16_are_taken_in_float32():
    model, ids = tiny_model(1, dtype=torch.bfloat16), text(2, 20)
    layer = observe(model, ids)[0]
    found = statistics.of_layer(layer, EPSILON)
    assert found["mass"].dtype == torch.float32
    is_visible = visible_keys(21, None, ids.device)
    torch.testing.assert_close(found["mass"], attention_mass(layer.attention.float(), is_visible))


WINDOWED = {
    "ours": lambda: tiny_model(1, layer_windows=[3, None], num_kept=1, hidden_size=32),
    "gemma2": lambda: random_model(small_families.config("gemma2")),
    "gpt_oss": lambda: random_model(small_families.config("gpt_oss")),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_each_layer_has_its_own_window(name):
    """A token that leaves a window is a sink as often as the queries that see it attend to it."""
    model = WINDOWED[name]()
    ids = text(1, 15) if name == "ours" else families.random_ids(16)
    windowed, full = observe(model, ids)
    num_seen = torch.tensor(seen_keys(16, windowed.rule)).sum(0)
    assert full.rule is None
    assert windowed.rule == (StreamShape(1, 3) if name == "ours" else StreamShape(0, 2))
    assert ((windowed.attention > 0).sum(-2) == num_seen).all()
    assert ((full.attention > 0).sum(-2) == torch.arange(16, 0, -1)).all()
    mass = statistics.of_layer(windowed, EPSILON)["mass"]
    torch.testing.assert_close(mass[..., :-1], windowed.attention.sum(-2) / num_seen)
