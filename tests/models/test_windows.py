"""Windowed layers, compared with a model that computes each query alone."""

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from sinklm.models import SinkGPTNeoXForCausalLM, fused_windows, windowed_attention
from sinklm.models.config import SINK_KINDS
from sinklm.models.windows import rules_of_pass

from ..streaming.tiny import YARN, use_float64
from .plain_windows import use_plain_kernels
from .test_modeling import pad
from .tiny import FIRST_SINK, draw_sinks, plain_twin, sinks, text, tiny_model
from .windows_oracle import windowed_logits

# Windows that do and do not divide the 12 tokens, that are longer, and mixed with full attention.
PATTERNS = {0: [4, 4], 1: [3, None], 2: [30, 5], 4: [1, 2]}


def windowed_model(kind="token", windows=(4, 4), num_kept=None, num_sinks=1, dtype=torch.float64, **settings):
    """A model whose sinks have an effect, in float64 throughout if ``dtype`` is float64."""
    sink = {"kind": kind}
    if kind == "token":
        sink |= {"num_tokens": num_sinks, "first_token_id": FIRST_SINK}
    settings = {"layer_windows": list(windows), "num_hidden_layers": len(windows), "eos_token_id": None} | settings
    model = tiny_model(0, dtype, sink=sink, num_kept=num_kept, **settings)
    draw_sinks(model)
    if dtype == torch.float64:
        use_float64(model)
    return model


def expected_logits(model, ids, window=None):
    """Logits ``(B, T, V)`` of the text."""
    rows = [windowed_logits(model, row, window) for row in torch.cat((sinks(model, len(ids)), ids), dim=1)]
    return torch.stack(rows)[:, model.config.num_sinks :]


def assert_near(ours, theirs, tolerance=1e-9):
    assert ((ours - theirs).norm() / theirs.norm()).item() <= tolerance


@pytest.mark.parametrize("num_kept", PATTERNS)
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_a_forward_pass_follows_the_streaming_rule(kind, num_kept):
    num_sinks = max(1, num_kept // 2) if kind == "token" else 0
    model = windowed_model(kind, PATTERNS[num_kept], max(num_kept, num_sinks), max(num_sinks, 1))
    ids = text(1, 12)
    expected = expected_logits(model, ids)
    assert_near(model(ids).logits, expected)
    model.set_attn_implementation("eager")
    tolerance = (
        1e-5 if kind in ("none", "token", "gate", "head_gate") else 1e-9
    )  # full layers: transformers' softmax is float32
    assert_near(model(ids).logits, expected, tolerance if None in model.config.windows else 1e-9)
    model.set_attn_implementation("sdpa")
    single = deepcopy(model.float())
    single.gpt_neox.rotary_emb = tiny_model(0).gpt_neox.rotary_emb
    assert_near(single(ids).logits.double(), expected, 1e-5)


def test_scaled_rotary_embeddings_follow_the_rule():
    rope = YARN | {"partial_rotary_factor": 1.0}
    model, ids = windowed_model(windows=[3, None], num_kept=2, rope_parameters=rope), text(1, 12)
    assert model.gpt_neox.rotary_emb.attention_scaling > 1
    assert_near(model(ids).logits, expected_logits(model, ids))


@pytest.mark.parametrize("kind", SINK_KINDS)
def test_gradients_of_all_parameters(kind):
    model, ids = windowed_model(kind, [3, None], num_kept=2), text(1, 9)
    logits, expected = model(ids).logits, expected_logits(model, ids)
    weights, parameters = torch.randn_like(expected), list(model.parameters())
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters) for x in (logits, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other)


def test_a_window_changes_the_output():
    """Otherwise the tests above would prove nothing."""
    model, ids = windowed_model(windows=[4, 4], num_kept=2), text(1, 12)
    logits = model(ids).logits
    for field, value in (("layer_windows", None), ("layer_windows", [4, 3]), ("num_kept", 1)):
        other = deepcopy(model)
        setattr(other.config, field, value)
        assert (other(ids).logits - logits).abs().max() > 0.01


@pytest.mark.parametrize("window", [1, 3, 6, torch.tensor(3)], ids=["1", "3", "6", "tensor"])
def test_the_window_of_a_pass(window):
    model, ids = windowed_model(windows=[6, None, 6]), text(2, 12)
    assert_near(model(ids, window=window).logits, expected_logits(model, ids, int(window)))
    assert_near(model(ids).logits, expected_logits(model, ids))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (0, "window is 0: it must be between 1 and the window of each layer, here 4"),
        (torch.tensor(5), "window is 5: it must be between 1"),
        (2.5, "window is 2.5: pass an int, or a 0-dimensional int64 tensor"),
        (True, "window is True: pass an int"),
        ("3", "window is '3': pass an int"),
        (torch.tensor([2]), r"window is a tensor of shape \(1,\)"),
        (torch.tensor(2.0), "torch.float32 on cpu: pass a 0-dimensional int64 tensor on the CPU"),
        (torch.tensor(2, device="meta"), "torch.int64 on meta: pass a 0-dimensional int64 tensor on the CPU"),
    ],
)
def test_other_windows_of_a_pass_are_an_error(window, message):
    with pytest.raises(ValueError, match=message):
        windowed_model()(text(1, 5), window=window)
    with pytest.raises(ValueError, match="a model without windowed layers: set layer_windows"):
        tiny_model()(text(1, 5), window=2)


@pytest.mark.parametrize(("kind", "num_kept"), [("none", 2), ("token", 3), ("kv_bias", 1)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(kind, num_kept, side, attention):
    model = windowed_model(kind, [3, 4], num_kept, num_sinks=2, attn_implementation=attention)
    rows = [text(1, 11), text(1, 7), text(1, 1)]
    ids, mask = pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, tokens in enumerate(rows):
        assert_near(logits[row][mask[row] == 1], expected_logits(model, tokens)[0])


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@pytest.mark.parametrize(("kind", "num_kept"), [("none", 2), ("token", 2), ("logit", 1)])
def test_a_cache_gives_the_logits_of_one_forward_pass(kind, num_kept, make, has_kernels, monkeypatch):
    if has_kernels:
        fuse(monkeypatch)
    model, rows = windowed_model(kind, [3, None], num_kept), [text(1, 11), text(1, 8)]
    ids, mask = pad(rows, "left")
    for given in (None, mask):
        cache = make(config=model.config, **({"max_cache_len": 16} if make is StaticCache else {}))
        logits, seen = [], 0
        for piece in ids.split([5, 1, 1, 4], dim=1):
            seen += piece.shape[1]
            seen_mask = None if given is None else given[:, :seen]
            logits.append(model(piece, attention_mask=seen_mask, past_key_values=cache).logits[1])
        expected = expected_logits(model, rows[1] if given is not None else ids[1:])[0]
        assert_near(torch.cat(logits)[-len(expected) :], expected)


def grown_cache(config):
    """A cache without a configuration adds its layers when they are used."""
    return DynamicCache()


@pytest.mark.parametrize(("make", "num_fused"), [(DynamicCache, 2), (grown_cache, 2), (StaticCache, 0)])
def test_prompts_without_padding_use_the_fused_pass(make, num_fused, monkeypatch):
    """Also a later one. No mask of the prompt's length squared is made."""
    fuse(monkeypatch)
    model, ids, calls = windowed_model(windows=[3, None], num_kept=2), text(2, 11), []
    band = fused_windows.band_forward
    monkeypatch.setattr(
        fused_windows, "band_forward", lambda *args, **kwargs: (calls.append(args), band(*args, **kwargs))[1]
    )
    expected = expected_logits(model, ids)
    for mask in (None, torch.ones_like(ids)):
        calls.clear()
        cache = make(config=model.config, **({"max_cache_len": 16} if make is StaticCache else {}))
        logits = []
        for end, piece in zip((6, 11), ids.split([6, 5], dim=1), strict=True):
            seen_mask = None if mask is None else mask[:, :end]
            logits.append(model(piece, attention_mask=seen_mask, past_key_values=cache).logits)
        assert len(calls) == num_fused
        assert_near(torch.cat(logits, dim=1), expected)


def test_a_step_does_not_wait_for_the_mask():
    """Only that of a prompt is read. Values on the meta device cannot be read."""
    model = windowed_model(dtype=torch.float32).to("meta")
    step, mask = torch.empty(1, 1, 48, device="meta"), torch.ones(1, 1, device="meta")
    assert not rules_of_pass(model.config, model.gpt_neox.rotary_emb, step, mask)[4].is_dense


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generation_with_a_cache_equals_that_without(settings):
    model = windowed_model(windows=[3, None], num_kept=2)
    ids, mask = pad([text(1, 9), text(1, 6)], "left")
    settings |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    without = {key: value for key, value in settings.items() if key != "cache_implementation"}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **without, use_cache=False))


def test_a_cache_that_drops_keys_is_an_error():
    model = windowed_model()
    model_config = deepcopy(model.config)
    model_config.sliding_window, model_config.layer_types = 4, ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="the cache drops keys that windowed layers keep: pass a DynamicCache"):
        model(text(1, 5), past_key_values=DynamicCache(config=model_config))


def test_eager_attention_gives_the_probabilities_of_all_keys():
    model, ids = windowed_model("none", [3, 3], num_kept=2, attn_implementation="eager"), text(1, 9)
    weights = model(ids, output_attentions=True).attentions[0]
    assert weights.shape == (1, 4, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    query, key = torch.arange(9)[:, None], torch.arange(9)
    visible = (key <= query) & ((key >= query - 3) | (key < 2))
    assert torch.equal(weights[0, 0] > 0, visible)


def test_attention_that_would_ignore_the_windows_is_an_error():
    model = windowed_model("none")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' does not support windowed layers: use 'sdpa' or 'eager'"):
        model(text(1, 5))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"windowed layers require one of shape \(batch, tokens\)"):
        model(text(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="one text in each row: position_ids must be consecutive and start at 0"):
        model(text(1, 5), position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert model(text(2, 5), position_ids=torch.arange(5).expand(2, -1)).logits.isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = windowed_model(windows=[3, None]), text(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        model(ids, labels=ids, window=torch.tensor(2)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_plain_folder_loads_with_windows_and_a_sink(tmp_path):
    source = tiny_model(0, torch.float32)
    plain_twin(source).save_pretrained(tmp_path / "plain")
    sink = {"kind": "token", "num_tokens": 1, "first_token_id": FIRST_SINK}
    model = SinkGPTNeoXForCausalLM.from_pretrained(tmp_path / "plain", sink=sink, layer_windows=[4, 4]).eval()
    assert (model.config.windows, model.config.num_kept) == ([4, 4], 1)
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path / "windowed")
    again, ids = SinkGPTNeoXForCausalLM.from_pretrained(tmp_path / "windowed").eval(), text(1, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)
    unlimited = SinkGPTNeoXForCausalLM.from_pretrained(tmp_path / "windowed", layer_windows=None).eval()
    assert not unlimited.config.has_windows
    expected = plain_twin(unlimited)(torch.cat((sinks(model, 1), ids), dim=1)).logits[:, 1:]
    torch.testing.assert_close(unlimited(ids).logits, expected)
    exact = model.double()
    use_float64(exact)
    assert_near(again(ids).logits.double(), expected_logits(exact, ids), 1e-5)


@pytest.mark.parametrize("kind", ["none", "token", "logit", "kv_bias", "gate", "head_gate"])
def test_the_fused_passes_are_those_of_the_mask(kind, monkeypatch):
    model, ids = windowed_model(kind, [3, None, 6], num_kept=2), text(2, 12)
    rules = rules_of_pass(model.config, model.gpt_neox.rotary_emb, model.gpt_neox.embed_in(ids))
    assert all(rule.is_dense for rule in rules.values())
    gradients = []
    for is_fused in (False, True):
        if is_fused:
            fuse(monkeypatch)
        model.zero_grad()
        model(ids, labels=ids, window=torch.tensor(2)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for masked, fused in zip(*gradients, strict=True):
        assert_near(fused, masked)


def fuse(monkeypatch) -> None:
    """Use the fused passes on a CPU, with kernels in plain torch."""
    use_plain_kernels(monkeypatch)
    monkeypatch.setattr(windowed_attention, "is_fused", lambda query, rule, dropout: rule.is_dense and not dropout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing", "is_fused"),
    [
        ("token", True, True),
        ("kv_bias", False, False),
        pytest.param("token", True, False, marks=pytest.mark.long),
        pytest.param("kv_bias", False, True, marks=pytest.mark.long),
    ],
)
def test_a_compiled_step_equals_the_eager_one_and_takes_any_window(kind, checkpointing, is_fused, monkeypatch):
    if is_fused:
        fuse(monkeypatch)
    model, sample = windowed_model(kind, [6, None], dtype=torch.float32), text(2, 12)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Neither is read in a compiled step, which would break its graph.
    given = {"position_ids": torch.arange(11)[None]} if is_fused else {"attention_mask": torch.ones(2, 11)}
    for window in (6, 2, 3):
        gradients = []
        for forward in (model, compiled):
            model.zero_grad()
            settings = {"skip_logits": True, "use_cache": False, "window": torch.tensor(window)} | given
            with torch.compiler.set_stance("default" if window == 6 else "fail_on_recompile"):
                forward(sample[:, :-1], labels=sample, **settings).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        for eager, fast in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SINK_KINDS)
def test_a_compiled_step_on_a_gpu_is_as_near_to_float64_as_full_attention(kind):
    """Sharp attention makes bfloat16 inexact; windows must not add to it. No window recompiles."""
    torch._dynamo.reset()
    sample, errors = text(4, 129), []
    for windows in ((None, None), (40, None)):
        model = windowed_model(kind, windows, hidden_size=128, num_attention_heads=2)
        settings = {"skip_logits": True, "use_cache": False}
        exact = {width: gradient_of(model, sample, window=width, **settings) for width in drawn(windows)}
        model.to("cuda", torch.bfloat16)
        model.gpt_neox.rotary_emb = GPTNeoXRotaryEmbedding(model.config).cuda()  # its frequencies stay float32
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        for i, (width, expected) in enumerate(exact.items()):
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                gradient = gradient_of(compiled, sample.cuda(), window=width, **settings)
            errors.append(((gradient - expected).norm() / expected.norm()).item())
    assert max(errors[1:]) <= 2 * errors[0]


def drawn(windows):
    return [None] if windows[0] is None else [torch.tensor(width) for width in (40, 17, 1)]


def gradient_of(model, sample, **settings):
    model.zero_grad()
    model(sample[:, :-1], labels=sample, **settings).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu().double()


def test_half_precision_by_autocast_and_by_weights():
    exact, ids = windowed_model("kv_bias", [4, 4], num_kept=2), text(2, 11)
    expected = exact(ids).logits
    model = windowed_model("kv_bias", [4, 4], num_kept=2, dtype=torch.float32)
    model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(ids).logits
        lowered.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for logits in (lowered, model.to(torch.bfloat16)(ids).logits):
        assert (logits.double() - expected).norm() < 0.05 * expected.norm()
