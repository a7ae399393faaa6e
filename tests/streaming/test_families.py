"""Every supported family computes the streaming rule, and the others are refused."""

import copy
import re
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sinklm.models.cache_argument import CACHE
from sinklm.streaming import Rotary, StreamingCache, families, layers, register_family, shared_rotary, steering, steps
from sinklm.streaming.families import FAMILIES, Family
from sinklm.streaming.refusals import refusal
from sinklm.streaming.rule import StreamShape
from sinklm.streaming.testing import check_family, random_model, reference_logits

from ..models.tiny import tiny_model
from . import oracle, small_families, tiny

GUIDE = small_families.PAGE.parent / "guides" / "add-a-model-family.md"


@pytest.fixture
def registry(monkeypatch):
    """The families, which a test may change."""
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    return families.FAMILIES


def shapes_of(name):
    """Caches for the test of a family: one, and a smaller window if a layer has its own."""
    return [(1, 5), (4, 2)] if any(layers.own_rules(small_families.config(name))) else [(4, 2)]


@pytest.mark.parametrize("name", small_families.FAMILIES)
def test_every_family_equals_the_stock_model(name):
    assert check_family(random_model(small_families.config(name)), shapes=shapes_of(name)) < 2e-5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", small_families.FAMILIES)
def test_every_family_equals_the_stock_model_in_all_caches(name):
    assert check_family(random_model(small_families.config(name))) < 2e-5


@pytest.mark.parametrize("name", [name for name in small_families.FAMILIES if not name.endswith(":window")])
@torch.no_grad()
def test_generate_streams_past_every_length_of_the_config(name):
    """Its text is the one that the streaming rule gives, also where a model drops other caches."""
    config = small_families.config(name)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = 15
    model, ids = random_model(config), tiny.random_ids(13)
    for num_new in (4, 2):  # the second prompt is longer than 15
        cache, again = (StreamingCache.for_model(model, num_kept=1, window=5) for _ in range(2))
        options = {"do_sample": False, "eos_token_id": None, "use_cache": True, "max_new_tokens": num_new}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **options)
        assert cache.get_seq_length() == ids.shape[1] - 1
        expected = model(ids, **{CACHE: again}).logits.argmax(-1)[0, -num_new - 1 : -1]
        assert ids[0, -num_new:].tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("name", small_families.FAMILIES)
def test_every_family_equals_the_stock_model_on_a_gpu(name):
    """With the kernels of the decoding step."""
    assert check_family(random_model(small_families.config(name)).cuda()) < 5e-5


def test_the_table_in_the_docs_has_every_family():
    page = small_families.PAGE.read_text()
    shown = page[page.index(small_families.HEADER) :].partition("\n\n")[0]
    differences = [float(cell) for cell in re.findall(r"\| ([0-9e.-]+) \|$", shown, flags=re.MULTILINE)]
    assert shown + "\n" == small_families.table(dict(zip(small_families.FAMILIES, differences, strict=True)))
    assert max(differences) < 1e-4
    assert {name.partition(":")[0] for name in small_families.FAMILIES} == set(FAMILIES)


@pytest.mark.parametrize("family", ["gpt_neox", "llama:yarn", "qwen3", "olmo2", "phi", "falcon:40b", "falcon:rw"])
@pytest.mark.parametrize("shape", [(0, 6), (4, 2)])
def test_the_reference_equals_the_oracle(family, shape):
    """It runs the stock model; the oracle computes each layer itself."""
    model, ids = tiny.build(tiny.config(family)), tiny.random_ids(13)[0]
    tiny.use_float64(model)
    expected = oracle.stream_logits(model, ids, *shape)
    torch.testing.assert_close(reference_logits(model, ids, *shape), expected, rtol=0, atol=1e-12)


WRONG = {
    "other pairs": ("glm", Family(shared_rotary)),
    "pairs of halves as interleaved": ("llama", Family(partial(shared_rotary, interleaved=True))),
    "first dimensions instead of the last": ("deepseek_v3", Family(shared_rotary)),
    "layers without positions": ("smollm3", Family(shared_rotary)),
    "other frequencies": ("llama", Family(lambda decoder, shape: Rotary(lambda: decoder.rotary_emb.inv_freq * 1.02))),
    "the base of other layers": ("gemma3_text", Family(lambda *given: families.rotary_by_layer_type(*given)[1])),
    "positions in layers without a window": ("cohere2", Family(partial(shared_rotary, interleaved=True))),
    "scaled by the length of the stream": ("llama4_text", Family(FAMILIES["llama4_text"].encoding)),
    "no distances": ("bloom", Family(lambda *_: families.Alibi(torch.zeros(4, 7)), FAMILIES["bloom"].adapter)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_family_does_not_pass(mistake, registry):
    model_type, registry[model_type] = WRONG[mistake][0], WRONG[mistake][1]
    with pytest.raises(AssertionError, match="logits differ from the streaming rule"):
        check_family(random_model(small_families.config(model_type)), shapes=shapes_of(model_type))


def test_keys_that_a_norm_changes_after_their_rotation_do_not_pass(registry):
    """Its weights are 1 before training, where it does not matter."""
    registry["hunyuan_v1_dense"] = Family(shared_rotary)
    with pytest.raises(AssertionError, match="logits differ from the streaming rule"):
        check_family(random_model(AutoConfig.for_model("hunyuan_v1_dense", **small_families.SMALL, head_dim=8)))


def test_every_family_with_windows_is_checked_with_a_small_one():
    """A setting that a model ignores would otherwise limit its layers in a stream only."""
    rows = {name: small_families.config(name) for name in small_families.FAMILIES}
    checked = {config.model_type for config in rows.values() if any(layers.own_rules(config))}
    assert {config.model_type for config in rows.values() if hasattr(config, "sliding_window")} <= checked


IGNORED = {
    "a window": ("gemma2", layers, "own_rules", lambda config: [None, None]),
    "a window that is one key larger": ("mistral:window", layers, "own_rules", lambda config: [StreamShape(0, 3)] * 2),
    "a limit of the scores": ("gemma2", steps, "Softmax", lambda scaling, *_: (scaling, None, None)),
    "sink logits": ("gpt_oss", steering, "SinkColumn", lambda score: None),
}


@pytest.mark.parametrize("ignored", IGNORED)
def test_all_parts_of_windowed_layers_matter(ignored, monkeypatch):
    name, module, attribute, wrong = IGNORED[ignored]
    shapes = shapes_of(name)  # before the patch, which may change them
    if attribute == "Softmax":
        softmax = steps.Softmax
        monkeypatch.setattr(module, attribute, lambda *given: softmax(*wrong(*given)))
    else:
        monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError, match="logits differ from the streaming rule"):
        check_family(random_model(small_families.config(name)), shapes=shapes)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral:window"])
@pytest.mark.parametrize("own_window", [2, 5, 7])
def test_windows_of_any_size_equal_the_stock_model(name, own_window):
    """Also if it shows some of the kept tokens of 4+2, and if it covers the cache."""
    config = small_families.config(name)
    config.sliding_window = own_window
    assert check_family(random_model(config)) < 2e-5


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("llama", {"sliding_window": 3}),
        ("gpt_neox", {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}),
        ("mistral:window", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gpt_neox", {"layer_windows": [3, 3], "num_kept": 1}),
    ],
)
def test_a_window_in_the_config_that_the_model_ignores_limits_no_layer(name, ignored):
    expected, config = layers.own_rules(small_families.config(name)), small_families.config(name)
    config.update(ignored)
    assert layers.own_rules(config) == expected
    assert check_family(random_model(config), shapes=[(1, 5)]) < 2e-5


@pytest.mark.parametrize(
    ("name", "setting"), [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})]
)
def test_a_model_whose_tokens_see_later_ones_is_an_error(name, setting):
    config = small_families.config(name)
    config.update(setting)
    with pytest.raises(ValueError, match=r"tokens see later ones .*use_bidirectional_attention in its config"):
        families.family_of(config, StreamShape(1, 5))


@torch.no_grad()
def test_half_precision_adds_the_error_of_dense_attention():
    """All experts are chosen, because rounding can choose another expert."""
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = small_families.config("gpt_oss")
        config.num_experts_per_tok = config.num_local_experts
        exact, ids = random_model(config), tiny.random_ids(40, seed=seed)
        half = copy.deepcopy(exact).half()
        exact.load_state_dict(half.state_dict())
        for stream in (False, True):
            options = [
                {CACHE: StreamingCache.for_model(m, num_kept=2, window=9)} if stream else {} for m in (half, exact)
            ]
            found, true = (m(ids, **option).logits.double() for m, option in zip((half, exact), options, strict=True))
            errors.append(((found - true).norm() / true.norm()).item())
    assert sum(errors[1::2]) < 1.5 * sum(errors[::2]) < 0.1


def test_a_window_of_the_token_alone_is_an_error():
    config = small_families.config("mistral:window")
    config.sliding_window = 1
    with pytest.raises(ValueError, match="sliding_window is 1, and its windowed layers see no other token"):
        families.family_of(config, StreamShape(4, 6))


def test_a_layer_of_an_unknown_type_is_an_error():
    config = small_families.config("gemma3_text")
    config.layer_types = ["sliding_attention", "dilated_attention"]
    with pytest.raises(ValueError, match="layers of type 'dilated_attention', which were not tested"):
        families.family_of(config, StreamShape(4, 6))


def test_an_unknown_argument_of_the_attention_is_an_error(monkeypatch):
    model = random_model(small_families.config("gpt_oss"))
    cache = StreamingCache.for_model(model, num_kept=1, window=5)
    forward = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "forward", lambda self, *a, **k: forward(self, *a, **k, bias=1.0)
    )
    with pytest.raises(ValueError, match="GptOssAttention: it passes 'bias' to its attention function"):
        model(tiny.random_ids(3), **{CACHE: cache})


def test_copied_layers_stream():
    """They have configs of their own, as those of LoRA with ``layer_replication``."""
    model = random_model(small_families.config("qwen3"))
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = copy.deepcopy(layer)
    assert check_family(model, shapes=[(1, 5)]) < 2e-5
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_layer_that_does_not_use_the_attention_of_the_cache_is_an_error(index, num_tokens):
    model = random_model(small_families.config("llama"))
    cache = StreamingCache.for_model(model, num_kept=1, window=5)
    attention = model.model.layers[index].self_attn
    attention.config = copy.deepcopy(attention.config)
    with pytest.raises(ValueError, match="a layer of the model does not use the attention of its StreamingCache"):
        model(tiny.random_ids(num_tokens), use_cache=True, **{CACHE: cache})


def test_layers_that_leave_out_queries_get_all_of_them():
    """Gemma 4 computes its last layers for the last tokens of a prompt only."""
    model, ids = random_model(small_families.config("gemma4_text")), tiny.random_ids(14)
    expected = reference_logits(model, ids[0], 1, 5)
    with torch.no_grad():
        for num_kept in (1, 2):
            cache = StreamingCache.for_model(model, num_kept=1, window=5, chunk_size=5)
            found = model(ids, logits_to_keep=num_kept, **{CACHE: cache}).logits[0]
            torch.testing.assert_close(found, expected[-num_kept:], rtol=0, atol=1e-4)


def test_a_check_that_proves_nothing_is_an_error():
    config = small_families.config("llama")
    with pytest.raises(ValueError, match="hardly depend on the positions"):
        check_family(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="must be at least 18"):
        check_family(random_model(config), num_tokens=14)
    with pytest.raises(ValueError, match=r"is in torch\.bfloat16"):
        check_family(random_model(config).bfloat16())
    broken = random_model(config)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="by nan"):
        check_family(broken)
    with pytest.raises(ValueError, match="has sink tokens"):
        check_family(tiny_model(num_sinks=1))


def test_a_family_can_be_registered_from_outside_as_in_the_guide(registry, capsys):
    register, check, *_ = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    with pytest.raises(ValueError, match=r"'persimmon': it was not tested .*register_family"):
        exec(check, {})
    exec(register, {})
    exec(check, {})
    assert float(capsys.readouterr().out) < 2e-5
    with pytest.raises(ValueError, match="'persimmon' is registered"):
        register_family("persimmon", shared_rotary)
    with pytest.raises(ValueError, match="'gpt2' cannot be registered for streaming: it adds absolute"):
        register_family("gpt2", shared_rotary)
    wrong = [("", shared_rotary), (None, shared_rotary), ("new", "shared_rotary"), ("new", shared_rotary, "OWN")]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"^(model_type|encoding|adapter) is .*: pass "):
            register_family(*arguments)


@pytest.mark.parametrize("encoding", [lambda *_: None, lambda *args: [shared_rotary(*args)], lambda *_: ["rotary"] * 2])
def test_an_encoding_that_returns_something_else_is_an_error(encoding, monkeypatch):
    model = random_model(small_families.config("llama"))
    monkeypatch.setitem(families.FAMILIES, "llama", families.Family(encoding))
    with pytest.raises(ValueError, match=r"'llama' returned .*: return Rotary or Alibi, .* each of the 2 layers"):
        StreamingCache.for_model(model, num_kept=1, window=5)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "absolute position embeddings"),
        ("mamba", "no keys to keep"),
        ("mvp", "absolute position embeddings"),
        ("xlnet", "neither rotary nor ALiBi"),
        ("t5", "neither rotary nor ALiBi"),
        ("hunyuan_v1_moe", "after their rotation"),
        ("persimmon", "not tested"),
    ],
)
def test_other_families_are_refused_with_the_reason(model_type, reason):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"does not support model type '{model_type}': .*{reason}"):
        families.family_of(config, StreamShape(4, 6))
    assert (refusal(model_type, config) is None) == (reason == "not tested")


@pytest.mark.parametrize(
    ("layer_type", "reason"),
    [
        ("chunked_attention", "chunks of the text"),
        ("linear_attention", "no keys to keep"),
        ("indexed_attention", "index of the whole text"),
    ],
)
def test_a_new_family_is_refused_by_the_kinds_of_its_layers(layer_type, reason):
    config = AutoConfig.for_model("persimmon")
    config.layer_types = ["full_attention", layer_type]
    with pytest.raises(ValueError, match=f"'persimmon': .*{reason}"):
        families.family_of(config, StreamShape(4, 6))


LIMITED = {
    "llama4_text": "num_kept \\+ window must be at most 6",
    "ministral3": "num_kept \\+ 2 \\* window must be at most 13",
    "phi3:longrope": "num_kept \\+ 2 \\* window must be at most 13",
    "phimoe": "num_kept \\+ 2 \\* window must be at most 13",
    "llama:dynamic": "num_kept \\+ 2 \\* window must be at most 13",
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_cache_in_which_the_model_computes_something_else_is_an_error(name):
    with pytest.raises(ValueError, match=LIMITED[name]):
        families.family_of(small_families.config(name), StreamShape(0, 7))


def test_frequencies_chosen_by_length_may_have_changed_before():
    """A long text without a cache sets the model's current frequencies."""
    for name in ("llama:dynamic", "phi3:longrope"):
        model, ids = random_model(small_families.config(name)), tiny.random_ids(40)
        expected = reference_logits(model, ids[0], 1, 5)
        cache = StreamingCache.for_model(model, num_kept=1, window=5)
        logits = []
        with torch.no_grad():
            for piece in ids.split(8, dim=1):
                logits.append(model(piece, **{CACHE: cache}).logits)
                model(ids, use_cache=False)
        torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=0, atol=1e-4)
