"""The kernels of the decoding step against plain PyTorch."""

import pytest
import torch
from sinklm.models.streaming import kernels
from sinklm.models.streaming.contract import StreamShape
from sinklm.models.streaming.encodings import Rotary
from sinklm.models.streaming.layer import StreamingLayer
from sinklm.models.streaming.steps import DecodeStep
from torch.nn import functional as F

pytestmark = pytest.mark.gpu

# kept, window, heads, groups, head size, rotary dimensions, pairs are neighbours
CASES = [
    (0, 7, 2, 2, 8, 4, False),
    (1, 37, 4, 2, 16, 8, False),
    (4, 130, 6, 2, 24, 12, True),
    (4, 1020, 12, 12, 64, 16, False),
    (20, 1500, 9, 3, 64, 64, False),
    (4, 4092, 32, 8, 128, 128, False),
]


def random_states(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_is_the_plain_step(case, monkeypatch):
    """From the first token on, past a full window, with rows that have seen different numbers of tokens."""
    num_kept, window, num_heads, num_groups, head_dim, rotary_dim, interleaved = case
    shape = StreamShape(num_kept, window)
    inv_freq = 10000.0 ** (-torch.arange(rotary_dim // 2, device="cuda") / (rotary_dim // 2))
    encoding = Rotary(lambda: inv_freq, interleaved=interleaved)
    plain, fused = StreamingLayer(shape), StreamingLayer(shape)
    key = random_states(2, num_groups, 1, head_dim)
    for layer in (plain, fused):
        layer.allocate(key, key)
    num_seen, base = torch.tensor([0, 3], device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    for step in range(40):
        if step == 20:  # jump to where the window is full and phases have been rebased
            for name in ("keys", "values", "kept_keys"):
                getattr(fused, name).copy_(getattr(plain, name).normal_())
            num_seen += 2 * window + 50
            base = num_seen - torch.tensor([shape.num_slots, shape.num_slots + window // 2], device="cuda")
        query = random_states(2, num_heads, 1, head_dim)
        key, value = random_states(2, num_groups, 1, head_dim), random_states(2, num_groups, 1, head_dim)
        arguments = (num_seen, base, query, key, value, 0.5)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "is_available", False)
            expected = DecodeStep(shape, encoding, num_seen, base).attend(plain, query, key, value, 0.5)
        out, lse = kernels.decode_attention(shape, encoding, fused, *arguments)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)
        visible = torch.arange(shape.num_slots, device="cuda") <= num_seen[:, None]
        scores = 0.5 * query @ plain.keys.repeat_interleave(num_heads // num_groups, dim=1).mT
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=2e-5)
        assert torch.equal(fused.values, plain.values)
        assert torch.equal(fused.keys[:, :, num_kept:], plain.keys[:, :, num_kept:])
        assert torch.equal(fused.kept_keys[:, :, :num_kept], plain.kept_keys[:, :, :num_kept])
        assert not fused.num_arrived.any()
        num_seen = num_seen + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_out", "num_in"), [(5, 8), (77, 96), (130, 768), (64, 100), (50304, 768), (512, 5504)])
def test_one_row_is_as_near_to_float64_as_cublas(num_out, num_in, dtype):
    weight, bias = random_states(num_out, num_in, dtype=dtype), random_states(num_out, dtype=dtype)
    states = random_states(1, 1, num_in, dtype=dtype)
    for row_bias in (None, bias):
        exact = F.linear(states.double(), weight.double(), None if row_bias is None else row_bias.double())
        with kernels.OneRowLinear():
            out = F.linear(states, weight, row_bias)
        assert out.shape == exact.shape
        assert out.dtype == dtype
        tolerance = 2 * (F.linear(states, weight, row_bias).double() - exact).abs().max() + 1e-4
        assert (out.double() - exact).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gelu_is_taken_in_only_where_it_follows_the_product(dtype):
    weight, bias, states = (random_states(*shape, dtype=dtype) for shape in ((77, 96), (77,), (1, 1, 96)))
    exact = F.gelu(F.linear(states.double(), weight.double(), bias.double()))
    with kernels.OneRowLinear():
        product = F.linear(states, weight, bias)
        taken_in, approximate, of_another = F.gelu(product), F.gelu(product, approximate="tanh"), F.gelu(product + 1)
    assert torch.equal(approximate, F.gelu(product, approximate="tanh"))
    assert torch.equal(of_another, F.gelu(product + 1))
    torch.testing.assert_close(taken_in.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_more_rows_are_left_to_cublas():
    weight, states = random_states(64, 32), random_states(2, 1, 32)
    with kernels.OneRowLinear():
        out = F.linear(states, weight)
    assert torch.equal(out, F.linear(states, weight))
