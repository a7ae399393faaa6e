"""Attention functions under the suite of `gradients`, and the suite under wrong functions."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sinklm.models import band, fused_windows
from sinklm.models.fused_attention import CPU
from sinklm.models.sink_column import FusedAttention, SinkColumn
from sinklm.models.windowed_attention import windowed_attention
from sinklm.models.windows import WindowRule

from .gradients import CASES, Case, exact_attention, failures
from .plain_windows import use_plain_kernels

FULL = [case for case in CASES if case.window is None]
WINDOWED = [case for case in CASES if case.window]


def column_of(query, sink_logit, sink_key, sink_value, scaling):
    if sink_key is not None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        return SinkColumn((query.to(dtype) * sink_key[:, None]).sum(-1) * scaling, sink_value)
    return None if sink_logit is None else SinkColumn(sink_logit[:, None])


def rule_of(query, window, num_kept, rotation, drawn=None):
    num_queries = query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    if rotation is None:
        rotation = (torch.ones(num_queries, 2, dtype=dtype), torch.zeros(num_queries, 2, dtype=dtype))
    cos, sin = (table.to(query.device)[None] for table in rotation)
    queries = torch.arange(num_queries, device=query.device)[None]
    return WindowRule(window, drawn, num_kept, queries, None, cos, sin, is_dense=True)


def windowed(query, key, value, *, window, num_kept, rotation, scaling, **sink):
    """`windowed_attention`, as models call it."""
    rule, column = rule_of(query, window, num_kept, rotation), column_of(query, **sink, scaling=scaling)
    return windowed_attention(query, key, value, rule, column, scaling)


def full(query, key, value, *, window, num_kept, rotation, scaling, **sink):
    """The attention of layers without windows."""
    column = column_of(query, **sink, scaling=scaling)
    if column is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return FusedAttention.apply(query, key, value, *column, scaling, CPU)


@pytest.mark.parametrize(("attention", "cases"), [(windowed, WINDOWED), (full, FULL)], ids=["windowed", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_on_a_cpu(attention, cases, dtype):
    assert list(failures(attention, dtype, cases=cases)) == []


@pytest.fixture
def plain_kernels(monkeypatch):
    use_plain_kernels(monkeypatch)


def fused_under(rule, query, key, value, scaling, **sink):
    column = column_of(query, **sink, scaling=scaling)
    states = (states.transpose(1, 2) for states in (query, key, value))
    return fused_windows.fused_windowed_attention(*states, rule, column, scaling).transpose(1, 2)


def fixed(query, key, value, *, window, num_kept, rotation, **others):
    return fused_under(rule_of(query, window, num_kept, rotation), query, key, value, **others)


def drawn(query, key, value, *, window, num_kept, rotation, **others):
    """With the window as that of a step of the training."""
    rule = rule_of(query, window + 3, num_kept, rotation, torch.tensor(window))
    return fused_under(rule, query, key, value, **others)


@pytest.mark.parametrize("attention", [fixed, drawn])
def test_the_fused_passes(plain_kernels, attention):
    assert list(failures(attention, cases=WINDOWED)) == []


def test_more_keys_than_queries(plain_kernels):
    """As in the later segments of a sample."""
    states = [torch.randn(2, 13, 3, 16, dtype=torch.float64) for _ in range(3)]
    rule = rule_of(states[0].transpose(1, 2), 4, 2, (torch.ones(13, 6).double(), torch.zeros(13, 6).double()))
    whole = fused_windows.fused_windowed_attention(*states, rule, None, 0.3)
    last = rule._replace(cos=rule.cos[:, 5:], sin=rule.sin[:, 5:])
    ours = fused_windows.fused_windowed_attention(states[0][:, 5:], *states[1:], last, None, 0.3)
    torch.testing.assert_close(ours, whole[:, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 8])
def test_a_drawn_window_is_checked_when_it_is_read(plain_kernels, window):
    states = [torch.randn(1, 13, 3, 16)] * 3
    rule = rule_of(states[0].transpose(1, 2), 7, 1, None, torch.tensor(window))
    with pytest.raises(
        ValueError, match=f"window is {window}: it must be between 1 and the window of each layer, here 7"
    ):
        fused_windows.fused_windowed_attention(*states, rule, None, 0.3)


def test_the_operators_are_registered_as_pytorch_requires(plain_kernels):
    """Shapes, dtypes and strides of the fake passes, with which a step is compiled."""
    projection = torch.randn(2, 9, 3, 48)
    states = projection.split(16, dim=-1)
    tables = (torch.ones(9, 6), torch.zeros(9, 6))
    settings = (torch.tensor(3), 5, 2, 0.3, False)
    checks = ("test_schema", "test_faketensor")  # the operators have no gradients of their own
    torch.library.opcheck(fused_windows.windows_forward, (*states, *tables, *settings), test_utils=checks)
    out, lse = fused_windows.windows_forward(*states, *tables, *settings)
    inputs = (out, *states, out, lse, *tables, *settings)
    torch.library.opcheck(fused_windows.windows_backward, inputs, test_utils=checks)


def test_flash_attention_is_called_as_pytorch_declares_it():
    """Uses meta tensors, which need no GPU."""
    query = torch.empty(2, 33, 3, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 40, 3, 64, dtype=torch.bfloat16, device="meta")
    out, lse = band.band_forward(query, key, key, 7, 0.3, False)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 3, 33), torch.float32)
    grads = band.band_backward(out, query, key, key, out, lse, 7, 0.3, False)
    assert [gradient.shape for gradient in grads] == [query.shape, key.shape, key.shape]


def with_wrong(**changes):
    """The oracle with some arguments replaced: errors from the field, or that are easily made."""

    def attention(query, key, value, **others):
        arguments = {"query": query, "key": key, "value": value, **others}
        return exact_attention(**(arguments | {name: change(arguments[name]) for name, change in changes.items()}))

    return attention


@pytest.mark.parametrize(
    ("attention", "case", "failing"),
    [
        (with_wrong(window=lambda window: window + 1), Case(13, 4), "output"),
        (with_wrong(num_kept=lambda num_kept: 0), Case(13, 4, 1), "output"),
        (with_wrong(rotation=lambda rotation: None), Case(13, 4, 1, num_rotated=6), "output"),
        (with_wrong(sink_value=lambda value: None), Case(13, 4, 1, "key and value"), "output"),
        # torchtitan#4796: a kernel without a gradient through its log-sum-exp
        (with_wrong(sink_logit=lambda logit: logit.detach()), Case(13, None, 0, "logit"), "sink_logit"),
        (with_wrong(sink_key=lambda key: key.detach()), Case(13, 4, 1, "key and value"), "sink_key"),
        (
            with_wrong(key=lambda key: torch.cat((key[:, :, :1].detach(), key[:, :, 1:]), dim=2)),
            Case(13, 4, 1),
            "the gradient of key",
        ),
    ],
)
def test_the_suite_finds_errors(attention, case, failing):
    assert any(failing in line for line in failures(attention, cases=[case]))
    assert list(failures(exact_attention, cases=[case])) == []


# -- On a GPU ----------------------------------------------------------------------------------

LONG = [
    case._replace(num_queries=num_queries, window=window, head_size=head_size)
    for num_queries, window in ((257, 64), (300, 77), (130, 500))
    for head_size in (64, 80)
    for case in (
        Case(0, 0, 0),
        Case(0, 0, 1, num_rotated=16),
        Case(0, 0, 4, "logit", 9.0, 16),
        Case(0, 0, 20, "key and value", 3.0, 64),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [fixed, drawn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_as_near_to_float64_as_pytorch_s_attention(dtype, attention):
    assert list(failures(attention, dtype, "cuda", LONG)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["fixed", "drawn"])
@pytest.mark.parametrize("num_kept", [0, 20])
def test_half_precision_with_more_keys_than_queries(num_kept, attention):
    """As in the later segments of a sample: output and gradients are those of the last queries."""
    states = [torch.randn(2, 300, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(2, 300, 3, 64, device="cuda", dtype=torch.bfloat16)
    grad[:, :100] = 0
    angles = torch.rand(300, 16, device="cuda")
    drawn = torch.tensor(77) if attention == "drawn" else None
    rule = rule_of(
        states[0].transpose(1, 2), 80 if attention == "drawn" else 77, num_kept, (angles.cos(), angles.sin())
    )
    rule = rule._replace(drawn=drawn)
    whole = fused_windows.fused_windowed_attention(*states, rule, None, 0.3)
    expected = torch.autograd.grad(whole, states, grad)
    last = rule._replace(cos=rule.cos[:, 100:], sin=rule.sin[:, 100:])
    ours = fused_windows.fused_windowed_attention(states[0][:, 100:], *states[1:], last, None, 0.3)
    found = torch.autograd.grad(ours, states, grad[:, 100:])
    for mine, theirs in zip((ours, *found), (whole[:, 100:], *expected), strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_queries", "window"), [(2, 5), (130, 500), (300, 77), (2048, 1023)])
@pytest.mark.parametrize(("head_size", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (128, torch.bfloat16)])
def test_cudnn_computes_the_band_of_flash_attention(head_size, dtype, num_queries, window):
    if not band.has_cudnn():
        pytest.skip("needs nvidia-cudnn-frontend")
    projection = torch.randn(2, num_queries, 3, 3 * head_size, device="cuda", dtype=dtype)
    states = projection.requires_grad_().split(head_size, dim=-1)
    assert band.can_cudnn(*states[:2])  # if a gradient is needed
    with torch.no_grad():
        assert not band.can_cudnn(*states[:2])
        grad = torch.randn(2, num_queries, 3, head_size, device="cuda", dtype=dtype)
        (out, lse), (expected, expected_lse) = (band.band_forward(*states, window, 0.1, by) for by in (True, False))
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
        inputs = (grad, *states, expected, expected_lse + 0.5, window, 0.1)  # of a softmax with further keys
        for mine, theirs in zip(*(band.band_backward(*inputs, by) for by in (True, False)), strict=True):
            assert (mine - theirs).norm() < 0.01 * theirs.norm()


def test_a_damaged_frontend_of_cudnn_is_one_warning(monkeypatch):
    def fail(name, *args, **kwargs):
        if name.startswith("cudnn"):
            raise OSError("libcudnn.so.9: cannot open shared object file")
        return original(name, *args, **kwargs)

    original = __import__
    monkeypatch.setattr(band, "find_spec", lambda name: "found")
    monkeypatch.setattr("builtins.__import__", fail)
    band.has_cudnn.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cannot be used, so FlashAttention computes windows: libcudnn\.so\.9"):
            assert not band.has_cudnn()
    finally:
        band.has_cudnn.cache_clear()


@pytest.mark.gpu
def test_the_deterministic_mode_gives_the_same_gradients_again():
    states = [torch.randn(2, 2048, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    rule, grad = rule_of(states[0].transpose(1, 2), 700, 4, None), torch.randn_like(states[0])
    torch.use_deterministic_algorithms(True)
    try:
        out = fused_windows.fused_windowed_attention(*states, rule, None, 0.1)
        first, *others = (torch.autograd.grad(out, states, grad, retain_graph=True) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_s_attention_on_a_gpu(dtype):
    assert list(failures(windowed, dtype, "cuda", WINDOWED)) == []


@pytest.mark.gpu
def test_memory_does_not_depend_on_length_times_window():
    def peak(num_queries, window):
        states = torch.randn(3, 1, num_queries, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
        states = [state.requires_grad_() for state in states]
        rule = rule_of(states[0].transpose(1, 2), window, 1, None)
        torch.cuda.reset_peak_memory_stats()
        fused_windows.fused_windowed_attention(*states, rule, None, 0.1).sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(1024, 64)  # loads the kernels
    assert peak(65536, 4096) <= 1.05 * peak(65536, 64)
    assert peak(65536, 64) <= 1.05 * 4 * peak(16384, 64)
