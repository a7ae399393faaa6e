"""The kernels of the decoding step, compared with plain PyTorch."""

import copy

import pytest
import torch
from torch.nn import functional as F

from sinklm.models.sink_column import SinkColumn
from sinklm.streaming import MemoryOptions, kernels
from sinklm.streaming.buffers import StreamingLayer
from sinklm.streaming.encodings import Rotary
from sinklm.streaming.layer_memory import LayerMemory
from sinklm.streaming.quantized import KV_DTYPES, QuantizedLayer
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


def counters(case):
    """Yield the tokens seen and the base of two ragged rows, and whether the stream has jumped.

    From the first token on; then beyond a full window, with phases that were moved back.
    """
    num_kept, window = case[:2]
    num_seen, base = torch.tensor([0, 3], device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    for _ in range(20):
        yield num_seen, base, False
        num_seen = num_seen + 1
    num_seen = num_seen + 2 * window + 50
    num_slots = num_kept + window + 1
    base = num_seen - torch.tensor([num_slots, num_slots + window // 2], device="cuda")
    for step in range(20):
        yield num_seen, base, step == 0
        num_seen = num_seen + 1


def rotary(case):
    *_, rotary_dim, interleaved = case
    inv_freq = 10000.0 ** (-torch.arange(rotary_dim // 2, device="cuda") / (rotary_dim // 2))
    return Rotary(lambda: inv_freq, interleaved=interleaved)


def plain_step(layer, shape, encoding, num_seen, base, states, scaling, monkeypatch, column=None):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "is_available", False)
        return DecodeStep([layer], shape, encoding, num_seen, base).attend(0, *states, scaling, column)


def expected_lse(query, keys, num_seen, scaling):
    """Log-sum-exp of the scores of visible slots, whose first keys are rotated."""
    visible = torch.arange(keys.shape[2], device="cuda") <= num_seen[:, None]
    scores = scaling * query @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).mT
    return scores.masked_fill(~visible[:, None, None], float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention_is_the_plain_step(case, dtype, monkeypatch):
    """The plain step computes in float32."""
    num_kept, window, num_heads, num_groups, head_dim, *_ = case
    shape, encoding = StreamShape(num_kept, window), rotary(case)
    plain, fused = StreamingLayer(shape), StreamingLayer(shape)
    key = random_states(2, num_groups, 1, head_dim, dtype=dtype)
    plain.allocate(key.float(), key.float())
    fused.allocate(key, key)
    for num_seen, base, has_jumped in counters(case):
        if has_jumped:
            for name in ("keys", "values", "kept_keys"):
                getattr(plain, name).copy_(getattr(fused, name).normal_())
        query = random_states(2, num_heads, 1, head_dim, dtype=dtype)
        key, value = (random_states(2, num_groups, 1, head_dim, dtype=dtype) for _ in range(2))
        scaling, as_float = 4 / head_dim, [states.float() for states in (query, key, value)]
        expected = plain_step(plain, shape, encoding, num_seen, base, as_float, scaling, monkeypatch)
        out, lse = kernels.decode_attention(shape, encoding, fused, num_seen, base, query, key, value, scaling)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=TOLERANCES[dtype])
        lse_of_plain = expected_lse(as_float[0], plain.keys, num_seen, scaling)
        torch.testing.assert_close(lse, lse_of_plain, rtol=1e-5, atol=TOLERANCES[dtype])
        assert torch.equal(fused.values.float(), plain.values)
        assert torch.equal(fused.keys[:, :, num_kept:].float(), plain.keys[:, :, num_kept:])
        assert torch.equal(fused.kept_keys[:, :, :num_kept].float(), plain.kept_keys[:, :, :num_kept])
        assert not fused.num_arrived.any()


# As CASES; windows below the number of recent tokens, more kept tokens than the window has, and
# head sizes that are not powers of 2, with one or more groups of 4 bits, also across both halves.
QUANTIZED_CASES = [
    (0, 7, 2, 2, 8, 4, False),
    (4, 31, 4, 2, 16, 8, False),
    (1, 33, 4, 2, 32, 32, True),
    (40, 36, 6, 2, 24, 12, True),
    (0, 130, 3, 1, 96, 96, False),
    (4, 1020, 12, 12, 64, 16, False),
    (20, 1500, 9, 3, 80, 20, False),
    (4, 4092, 32, 8, 128, 128, False),
    (4, 130, 4, 1, 256, 256, False),
]


def fill(plain, fused):
    """Fill the buffers of both layers with the same codes and states, of realistic scales."""
    for name, buffer in fused.buffers.items():
        if name == "num_arrived":
            continue
        if name.endswith("codes"):
            limits = (-127, 128) if buffer.dtype == torch.int8 else (0, 256)
            buffer.copy_(torch.randint(*limits, buffer.shape, device="cuda"))
        elif name.endswith("scales") and fused.kv_dtype == "int8":
            buffer.uniform_(0.01, 0.03)
        elif name.endswith("scales"):
            buffer[..., ::2].uniform_(0.1, 0.3)
            buffer[..., 1::2].uniform_(-3, -1)
        else:
            buffer.normal_()
        getattr(plain, name).copy_(buffer)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=str)
def test_quantized_attention_is_the_plain_step(case, dtype, kv_dtype, monkeypatch):
    """The plain step computes in float32. Codes and scales are the same bits."""
    num_kept, window, num_heads, num_groups, head_dim, *_ = case
    shape, encoding = StreamShape(num_kept, window), rotary(case)
    plain, fused = QuantizedLayer(kv_dtype, shape), QuantizedLayer(kv_dtype, shape)
    key = random_states(2, num_groups, 1, head_dim, dtype=dtype)
    plain.allocate(key.float(), key.float())
    fused.allocate(key, key)
    for num_seen, base, has_jumped in counters(case):
        if has_jumped:
            fill(plain, fused)
        query = random_states(2, num_heads, 1, head_dim, dtype=dtype)
        key, value = (random_states(2, num_groups, 1, head_dim, dtype=dtype) for _ in range(2))
        scaling, as_float = 4 / head_dim, [states.float() for states in (query, key, value)]
        expected = plain_step(plain, shape, encoding, num_seen, base, as_float, scaling, monkeypatch)
        out, lse = kernels.decode_attention(shape, encoding, fused, num_seen, base, query, key, value, scaling)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=TOLERANCES[dtype])
        keys = plain.read(DecodeStep([plain], shape, encoding, num_seen, base))[0]
        if num_kept:
            turn = (num_seen - base - shape.query_position(num_seen))[:, None]
            keys[:, :, :num_kept] = encoding.turn(keys[:, :, :num_kept], encoding.phases(turn, like=keys))
        lse_of_plain = expected_lse(as_float[0], keys, num_seen, scaling)
        torch.testing.assert_close(lse, lse_of_plain, rtol=1e-5, atol=TOLERANCES[dtype])
        for name, buffer in fused.buffers.items():
            assert torch.equal(buffer, getattr(plain, name).to(buffer.dtype)), name


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


# -- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_token_also_sees_the_chosen_blocks_of_a_memory(case, dtype, monkeypatch):
    """The plain step computes in float32."""
    num_kept, window, num_heads, num_groups, head_dim, *_ = case
    shape, encoding, tolerance = StreamShape(num_kept, window), rotary(case), TOLERANCES[dtype]
    options = MemoryOptions(block_size=4, num_blocks=5, interval=3, representative_size=1)
    plain, fused = StreamingLayer(shape), StreamingLayer(shape)
    query = random_states(2, num_heads, 1, head_dim, dtype=dtype)
    keys, values = (random_states(2, num_groups, 20, head_dim, dtype=dtype) for _ in range(2))
    for layer in (plain, fused):
        first = [states.float() if layer is plain else states for states in (query, keys[:, :, :1], values[:, :, :1])]
        layer.allocate(*first[1:])
        layer.memory = LayerMemory(options, shape, encoding)
        layer.memory.allocate(*first)
        layer.memory.keep(keys, values, torch.tensor(0))
    for step, (num_seen, base, has_jumped) in enumerate(counters(case)):
        if has_jumped:
            fill(plain, fused)
        for layer in (plain, fused):
            layer.memory.num_chosen.fill_(step % (options.num_blocks + 1))
        query = random_states(2, num_heads, 1, head_dim, dtype=dtype)
        key, value = (random_states(2, num_groups, 1, head_dim, dtype=dtype) for _ in range(2))
        scaling, as_float = 4 / head_dim, [states.float() for states in (query, key, value)]
        column = SinkColumn(random_states(2, num_heads, 1), random_states(2, num_heads, 1, head_dim))
        step = DecodeStep([fused], shape, encoding, num_seen, base)
        out = step.attend(0, query, key, value, scaling, column)
        expected = plain_step(plain, shape, encoding, num_seen, base, as_float, scaling, monkeypatch, column)
        torch.testing.assert_close(out.float(), expected, rtol=1e-5, atol=tolerance)
        queries = fused.memory.queries.float(), plain.memory.queries
        torch.testing.assert_close(*queries, rtol=0, atol=tolerance)
        assert not fused.num_arrived.any()


@pytest.mark.parametrize("sizes", [(4, 1, 1), (64, 4, 8), (48, 4, 3), (128, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_chooses_blocks_without_waiting(case, dtype, sizes):
    """They have the largest weights of a plain choice, except for rounding."""
    num_kept, window, num_heads, num_groups, head_dim, *_ = case
    block_size, representative_size, interval = sizes
    has_positions = interval < 8
    shape, encoding = StreamShape(num_kept, window), rotary(case)
    options = MemoryOptions(block_size, 5, interval, representative_size)
    query, key = (random_states(2, num, 1, head_dim, dtype=dtype) for num in (num_heads, num_groups))
    memory = LayerMemory(options, shape, encoding)
    memory.allocate(query, key, key)
    memory.queries.copy_(random_states(*memory.queries.shape, dtype=dtype))
    for num_blocks in (1, 4, 35, 150):
        new = 2, num_groups, num_blocks - len(memory.blocks), block_size, head_dim
        numbers = torch.arange(len(memory.blocks), num_blocks, device=query.device).to(dtype)
        memory.blocks.append(random_states(*new, dtype=dtype), numbers[:, None, None].expand(new))
        token = shape.num_cached + num_blocks * block_size
        num_seen, base = (
            torch.full((2,), token, device=query.device),
            torch.tensor([token - 7, token - 2], device=query.device),
        )
        kept_keys = random_states(2, num_groups, num_kept + 1, head_dim, dtype=dtype)
        prepare(memory)
        plain = copy.deepcopy(memory)
        states = memory.queries, memory.keys, memory.values, memory.num_chosen
        for mode in ("default", "error"):  # the first time, the kernels are compiled
            torch.cuda.set_sync_debug_mode(mode)
            try:
                memory.choose_for_token(query, kept_keys, num_seen, base, *states, 3 / head_dim, has_positions)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        turned, weights = plain_weights(plain, query, kept_keys, num_seen, base, 3 / head_dim, has_positions)
        own = memory.queries[:, :, token % memory.queries.shape[2]]
        torch.testing.assert_close(own.float(), turned.float(), rtol=1e-5, atol=TOLERANCES[dtype])
        chosen, most = memory.values[:, :, ::block_size, 0].long(), min(num_blocks, 5)
        assert memory.num_chosen == most
        assert all(len(set(row)) == most for row in chosen[:, :, :most].flatten(0, 1).tolist())
        found = weights.gather(2, chosen[:, :, :most]).sum(2)
        largest = weights.topk(most, dim=2).values.sum(2)
        torch.testing.assert_close(found, largest, rtol=1e-5 if dtype == torch.float32 else 0.03, atol=0)
        stored, _ = memory.blocks.gather(chosen[:, :, None])
        assert torch.equal(memory.keys, stored[:, :, 0])


def prepare(memory):
    memory.choose_from(memory.readable_blocks(), random_states(memory.num_scores(memory.readable_blocks())))


def plain_weights(memory, query, kept_keys, num_seen, base, scaling, has_positions):
    """Return the new query in the memory, and the weights ``(B, G, blocks)`` of a plain choice."""
    if has_positions:
        steps = (memory.shape.window + memory.options.block_size - (num_seen - base))[:, None]
        query = memory.encoding.turn(query, memory.encoding.phases(steps, like=query))
    token, query = int(num_seen[0]), query * scaling
    queries = torch.cat((memory.queries_before(token)[:, :, 1:], query), dim=2)[:, :, None]
    kept = memory.turned_kept(kept_keys[:, :, : memory.shape.num_kept], has_positions)
    num_evicted = torch.tensor([memory.num_evicted(token)], device=query.device)
    index = [memory.blocks.seen_from("index", query.device).movedim(0, 2)]
    return query[:, :, 0], memory.weights(queries, kept, num_evicted, index)[:, :, 0]
