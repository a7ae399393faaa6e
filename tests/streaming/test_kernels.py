"""The kernels of the decoding step, compared with plain PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from sinklm.streaming import kernels
from sinklm.streaming.buffers import StreamingLayer
from sinklm.streaming.encodings import Rotary
from sinklm.streaming.rule import StreamShape
from sinklm.streaming.steps import DecodeStep

pytestmark = pytest.mark.gpu

# kept, window, heads, groups, head size, rotary dimensions, interleaved
CASES = [
    (0, 7, 2, 2, 8, 4, False),
    (1, 37, 4, 2, 16, 8, False),
    (4, 130, 6, 2, 24, 12, True),
    (4, 1020, 12, 12, 64, 16, False),
    (20, 1500, 9, 3, 64, 64, False),
    (4, 4092, 32, 8, 128, 128, False),
    (4, 252, 71, 1, 64, 64, False),  # Falcon 7B
    (4, 130, 4, 1, 256, 256, False),  # Gemma
]
# For outputs and scores. In half precision, a rotated query is rounded once more.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_states(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_is_the_plain_step(case, dtype, monkeypatch):
    """From the first token to beyond a full window, for rows with different numbers of tokens.

    The plain step computes in float32.
    """
    num_kept, window, num_heads, num_groups, head_dim, rotary_dim, interleaved = case
    shape = StreamShape(num_kept, window)
    inv_freq = 10000.0 ** (-torch.arange(rotary_dim // 2, device="cuda") / (rotary_dim // 2))
    encoding = Rotary(lambda: inv_freq, interleaved=interleaved)
    plain, fused = StreamingLayer(shape), StreamingLayer(shape)
    key = random_states(2, num_groups, 1, head_dim, dtype=dtype)
    plain.allocate(key.float(), key.float())
    fused.allocate(key, key)
    num_seen, base = torch.tensor([0, 3], device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    for step in range(40):
        if step == 20:  # jump ahead: the window is full and phases have been rebased
            for name in ("keys", "values", "kept_keys"):
                getattr(plain, name).copy_(getattr(fused, name).normal_())
            num_seen += 2 * window + 50
            base = num_seen - torch.tensor([shape.num_slots, shape.num_slots + window // 2], device="cuda")
        query = random_states(2, num_heads, 1, head_dim, dtype=dtype)
        key, value = (random_states(2, num_groups, 1, head_dim, dtype=dtype) for _ in range(2))
        scaling, as_float = 4 / head_dim, [states.float() for states in (query, key, value)]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "is_available", False)
            expected = DecodeStep([plain], shape, encoding, num_seen, base).attend(0, *as_float, scaling)
        out, lse = kernels.decode_attention(shape, encoding, fused, num_seen, base, query, key, value, scaling)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=TOLERANCES[dtype])
        visible = torch.arange(shape.num_slots, device="cuda") <= num_seen[:, None]
        scores = scaling * as_float[0] @ plain.keys.repeat_interleave(num_heads // num_groups, dim=1).mT
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=TOLERANCES[dtype])
        assert torch.equal(fused.values.float(), plain.values)
        assert torch.equal(fused.keys[:, :, num_kept:].float(), plain.keys[:, :, num_kept:])
        assert torch.equal(fused.kept_keys[:, :, :num_kept].float(), plain.kept_keys[:, :, :num_kept])
        assert not fused.num_arrived.any()
        num_seen = num_seen + 1


def test_states_may_have_any_memory_layout():
    """States that are not contiguous in the last dimension are copied."""
    shape, inv_freq = StreamShape(4, 37), torch.rand(8, device="cuda")
    num_seen, base = torch.full((2,), 60, device="cuda"), torch.full((2,), 30, device="cuda")
    states = [random_states(2, 2, 1, 16) for _ in range(3)]
    outputs = []
    for inputs in (states, [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in states]):
        layer = StreamingLayer(shape)
        layer.allocate(states[0], states[0])
        for buffer in (layer.keys, layer.values, layer.kept_keys):
            buffer.fill_(0.5)
        outputs.append(kernels.decode_attention(shape, Rotary(lambda: inv_freq), layer, num_seen, base, *inputs, 0.5))
    assert torch.equal(outputs[0][0], outputs[1][0])

    weight, wide, wide_bias = random_states(77, 96), random_states(1, 1, 192), random_states(154)
    with kernels.OneRowLinear():
        out = F.linear(wide[..., ::2], weight, wide_bias[::2])
        expected = F.linear(wide[..., ::2].contiguous(), weight, wide_bias[::2].contiguous())
    assert torch.equal(out, expected)


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
def test_a_gelu_is_fused_only_if_it_follows_the_product(dtype):
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
