"""Arms without sink tokens, compared with the same model computed query by query."""

import math

import pytest
import torch
from transformers import DynamicCache

from sinklm.checkpoints import load_model
from sinklm.models import SinkGPTNeoXForCausalLM, sink_column
from sinklm.models.arms import ARMS
from sinklm.models.attention import SinkAttention
from sinklm.models.modeling import SinkGPTNeoXModel

from ..streaming.oracle import dense_logits
from ..streaming.tiny import use_float64
from .test_modeling import pad
from .tiny import plain_twin, text, tiny_arm, tiny_config, tiny_model

COLUMN_KINDS = tuple(kind for kind, attention in ARMS.items() if attention.column is not SinkAttention.column)
own_parameters = pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("zero", set()),
        ("logit", {"sink_logit"}),
        ("kv_bias", {"sink_key", "sink_value"}),
        ("gate", {"gate.weight"}),
        ("head_gate", {"head_gate.weight"}),
    ],
)
every_arm = pytest.mark.parametrize("kind", ARMS)


@every_arm
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary", [0.25, 1.0])
def test_logits_and_gradients_equal_the_slow_model(kind, attention, parallel, rotary):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    model = tiny_arm(kind, use_parallel_residual=parallel, rope_parameters=rope, hidden_size=32)
    model.set_attn_implementation(attention)
    use_float64(model)
    ids, parameters = text(1, 11), list(model.parameters())
    # Arms without a column use transformers' eager attention, whose softmax is float32.
    tolerance = 1e-4 if kind not in COLUMN_KINDS and attention == "eager" else 1e-9

    logits, expected = model(ids).logits[0], dense_logits(model, ids[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    weights = torch.randn_like(logits)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters) for x in (logits, expected))
    for (name, _), mine, other in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@every_arm
def test_an_arm_is_not_the_plain_model(kind):
    """The sinks of these tests have an effect; otherwise the tests above would prove nothing."""
    model, ids = tiny_arm(kind), text(1, 11)
    plain = tiny_model(0)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", COLUMN_KINDS)
def test_eager_attention_gives_the_probabilities_of_the_tokens(kind):
    model = tiny_arm(kind, attn_implementation="eager")
    weights = model(text(2, 7), output_attentions=True).attentions[0]
    assert weights.shape == (2, 4, 7, 7)
    assert weights.sum(-1).max() < 1


@pytest.mark.parametrize("kind", COLUMN_KINDS)
def test_attention_that_would_ignore_the_sink_is_an_error(kind):
    model = tiny_arm(kind)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=rf"'flash_attention_2' does not support sink\.kind='{kind}': use 'sdpa' or 'eager'"
    ):
        model(text(1, 5))


@every_arm
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    model, rows = tiny_arm(kind), [text(1, 9), text(1, 5)]
    ids, mask = pad(rows, side)
    batch = model(ids, attention_mask=mask).logits
    for row, tokens in enumerate(rows):  # the padded row is shifted, and transformers' rotary tables are float32
        torch.testing.assert_close(batch[row][mask[row] == 1], model(tokens).logits[0], rtol=0, atol=1e-5)


@every_arm
def test_a_cache_gives_the_logits_of_one_forward_pass(kind):
    model, ids = tiny_arm(kind), text(2, 10)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 10


@every_arm
@pytest.mark.parametrize("unequal", [False, True], ids=["one length", "unequal lengths"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_generation_equals_that_without_a_cache(kind, unequal, cache):
    if unequal and "prefill_chunk_size" in cache:
        pytest.skip("transformers' chunked prefill does not support padding")
    model = tiny_arm(kind, eos_token_id=None)
    ids, mask = pad([text(1, 9), text(1, 6 if unequal else 9)], "left")
    written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **cache)[:, 9:]
    for row in range(2):
        tokens = ids[row : row + 1, mask[row] == 1]
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(written[row], tokens[0, -12:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("kv_bias", True),
        ("gate", False),
        pytest.param("zero", False, marks=pytest.mark.long),  # has the code of kv_bias
        pytest.param("head_gate", True, marks=pytest.mark.long),  # has the code of gate
    ],
)
def test_the_compiled_training_step_equals_the_eager_one(kind, checkpointing):
    model, sample = tiny_arm(kind, dtype=torch.float32, num_hidden_layers=1), text(2, 12)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(sample[:, :-1], labels=sample, skip_logits=True, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", COLUMN_KINDS)
def test_training_and_generation_do_not_use_the_explicit_softmax(kind, monkeypatch):
    monkeypatch.delattr(sink_column, "explicit_attention")
    model, ids = tiny_arm(kind), text(2, 9)
    model(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=3, eos_token_id=None, pad_token_id=0)


@pytest.mark.gpu
@every_arm
def test_a_compiled_step_on_a_gpu_is_as_near_to_float64_as_an_eager_one(kind):
    model, sample = tiny_arm(kind, hidden_size=128, num_attention_heads=2), text(4, 129)
    settings = {"skip_logits": True, "use_cache": False}
    model(sample[:, :-1], labels=sample, **settings).loss.backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model, sample = model.to("cuda", torch.bfloat16), sample.cuda()
    errors = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        forward(sample[:, :-1], labels=sample, **settings).loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        errors.append((gradient.cpu().double() - exact).norm())
    assert errors[1] <= 1.5 * errors[0]


@every_arm
def test_half_precision_by_autocast_and_by_weights(kind):
    """ZeRO stage 0 trains with autocast, the other stages with half-precision weights.

    Dtypes match in both cases, and scores are not rounded away.
    """
    exact, ids = tiny_arm(kind), text(2, 11)
    expected = exact(ids).logits
    model = tiny_arm(kind, dtype=torch.float32)
    model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(ids).logits
        lowered.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    halved = model.to(torch.bfloat16)(ids).logits
    for logits in (lowered, halved):
        assert (logits.double() - expected).norm() < 0.05 * expected.norm()


@own_parameters
def test_a_checkpoint_has_the_names_of_gpt_neox_and_its_arms_own(kind, names, tmp_path):
    from safetensors import safe_open

    model = tiny_arm(kind, dtype=torch.float32)
    model.save_pretrained(tmp_path / "arm")
    plain_twin(tiny_model(0, dtype=torch.float32)).save_pretrained(tmp_path / "plain")
    arm, plain = (set(safe_open(tmp_path / x / "model.safetensors", "pt").keys()) for x in ("arm", "plain"))
    layers = range(model.config.num_hidden_layers)
    assert arm == plain | {f"gpt_neox.layers.{layer}.attention.{name}" for layer in layers for name in names}
    again, ids = load_model(tmp_path / "arm"), text(1, 5)
    assert isinstance(again, SinkGPTNeoXForCausalLM)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


@every_arm
def test_a_plain_model_loaded_with_an_arm_starts_at_the_arms_initial_values(kind, tmp_path):
    source = plain_twin(tiny_model(0, dtype=torch.float32))
    source.save_pretrained(tmp_path)
    model = SinkGPTNeoXForCausalLM.from_pretrained(tmp_path, sink={"kind": kind})
    theirs = source.state_dict()
    for name, weight in model.state_dict().items():
        if name in theirs:
            assert torch.equal(weight, theirs[name])
        elif "gate" in kind:
            assert weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 48)), rel=0.1)
        else:
            assert not weight.any()


@pytest.mark.parametrize("loader", [SinkGPTNeoXForCausalLM, SinkGPTNeoXModel])
@pytest.mark.parametrize("kind", ["none", "zero", "kv_bias", "gate", "head_gate"])
def test_weights_of_another_arm_are_an_error(kind, loader, tmp_path):
    tiny_arm("logit", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"0\.attention\.sink_logit, which sink\.kind='{kind}' does not have: load"):
        loader.from_pretrained(tmp_path, sink={"kind": kind})


@pytest.mark.parametrize(("kind", "other"), [("gate", "head_gate"), ("head_gate", "gate")])
def test_the_two_kinds_of_gates_are_told_apart(kind, other, tmp_path):
    tiny_arm(kind, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"attention\.{kind}\.weight, which sink\.kind='{other}' does not have: load"):
        SinkGPTNeoXForCausalLM.from_pretrained(tmp_path, sink={"kind": other})


def test_weights_without_a_parameter_of_the_configuration_are_an_error(tmp_path):
    tiny_model(0, dtype=torch.float32).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"kind": "none"', '"kind": "logit"'))
    with pytest.raises(ValueError, match=r"lack gpt_neox\.layers\.0\.attention\.sink_logit, which .*config\.json requ"):
        load_model(tmp_path)


@every_arm
def test_with_the_same_seed_an_arm_starts_from_the_weights_of_the_plain_model(kind):
    plain, arm = (seeded(SinkGPTNeoXForCausalLM, tiny_config(0, sink={"kind": k})) for k in ("none", kind))
    weights = arm.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())


def seeded(cls, config):
    torch.manual_seed(0)
    return cls(config)


@own_parameters
def test_the_first_values_of_an_arm(kind, names):
    """Zeros, except the matrices of gates: like all matrices that read the residual stream."""
    model = SinkGPTNeoXForCausalLM(tiny_config(0, sink={"kind": kind}, hidden_size=128))
    own = {name: p for name, p in model.named_parameters() if "sink" in name or "gate" in name}
    assert {name.partition("attention.")[2] for name in own} == names
    for name, parameter in own.items():
        if name.endswith("gate.weight"):
            assert parameter.std().item() == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.05)
        else:
            assert not parameter.any()


def test_untrained_logit_and_kv_bias_arms_equal_the_zero_arm():
    ids = text(1, 9)
    logits = [
        seeded(SinkGPTNeoXForCausalLM, tiny_config(0, sink={"kind": kind}))(ids).logits
        for kind in ("zero", "logit", "kv_bias")
    ]
    # Not bit for bit: the rounding of MKL's products depends on the memory addresses of operands.
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-5, atol=1e-6)
