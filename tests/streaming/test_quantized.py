"""Quantized keys and values: what is exact, and how far the rest is off."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklm.streaming import StreamingCache, stream_losses
from sinklm.streaming.quantized import KV_DTYPES, NUM_RECENT, RecentTokens, check_head_sizes
from sinklm.streaming.testing import random_model

from . import small_families, tiny
from .test_batches import pad_left

WINDOW = 100


@pytest.fixture(scope="module", params=["llama", "gptj", "mpt"])
def model(request):
    return tiny.build(tiny.config(request.param), dtype=torch.float32)


def for_model(model, kv_dtype, **sizes):
    return StreamingCache.for_model(model, **{"num_kept": 3, "window": WINDOW} | sizes, kv_dtype=kv_dtype)


@torch.no_grad()
def run(model, cache, *passes, **kwargs):
    return torch.cat([model(ids, past_key_values=cache, use_cache=True, **kwargs).logits for ids in passes], dim=1)


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(KV_DTYPES)),
    head_dim=st.sampled_from([2, 16, 48, 64, 128]),
    scale=st.floats(1e-6, 1e6),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_the_error_is_at_most_half_a_step(name, head_dim, scale, offset, seed):
    states = scale * (torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(seed)) + offset)
    states[0, 0] = 0
    codes, parameters = KV_DTYPES[name].quantize(states)
    found = KV_DTYPES[name].dequantize(codes, parameters, torch.float32)
    if name == "int8":
        step = states.abs().amax(-1, keepdim=True) / 127
    else:
        groups = states.unflatten(-1, (-1, 32 if head_dim % 32 == 0 else head_dim))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
        step = (
            (step + groups.abs().amax(-1, keepdim=True) / 2**9).expand(groups.shape).flatten(-2)
        )  # rounding of bfloat16
    # The largest value loses up to 2^-8 of itself where the step is rounded down to bfloat16.
    assert ((found - states).abs() <= step / 2 + states.abs() * 2**-8 + 1e-30).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_tokens_are_exact_while_they_are_kept_or_recent(model, kv_dtype):
    """A text of kept and recent tokens only has the logits of an unquantized cache."""
    ids = tiny.random_ids(NUM_RECENT + 3)
    expected = run(model, for_model(model, None), *ids.split(1, dim=1))
    found = run(model, for_model(model, kv_dtype), *ids.split(1, dim=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_kept_keys_and_values_are_never_quantized(model, kv_dtype):
    ids = tiny.random_ids(250)
    plain, quantized = for_model(model, None), for_model(model, kv_dtype)
    for cache in (plain, quantized):
        run(model, cache, ids[:, :7], *ids[:, 7:12].split(1, dim=1), ids[:, 12:])
    expected, found = plain.streams.layers[0], quantized.streams.layers[0]  # deeper layers see quantized keys
    torch.testing.assert_close(found.kept_keys[:, :, :3], expected.kept_keys[:, :, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.first_values, expected.first_values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 0.05), ("int4", 0.35)])
def test_logits_are_close_in_all_kinds_of_passes(model, kv_dtype, tolerance):
    """After the window has wrapped and phases were moved back, more than once."""
    ids = tiny.random_ids(140)
    expected = run(model, for_model(model, None, window=50), ids)
    for passes in (ids.split(1, dim=1), ids.split(80, dim=1)):
        found = run(model, for_model(model, kv_dtype, window=50), *passes)
        error = (found - expected).pow(2).mean().sqrt() / expected.std()
        assert 0 < error < tolerance


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rows_copies_and_padding_change_nothing(model, kv_dtype):
    streams = [tiny.random_ids(n, seed=n)[0] for n in (150, 90, 20)]
    ids, mask = pad_left(streams)
    batch = for_model(model, kv_dtype)
    run(model, batch, ids, attention_mask=mask)
    pad = torch.tensor([[1], [0], [1]])
    turns = [tiny.random_ids(1, batch_size=3, seed=n) for n in range(9)]
    for ids in turns:
        run(model, batch, ids, attention_mask=pad)
    batch = copy.deepcopy(batch)
    batch.reorder_cache(torch.tensor([2, 0, 1]))
    found = run(model, batch, tiny.random_ids(1, batch_size=3, seed=50)[[2, 0, 1]])
    for place, row in enumerate((2, 0, 1)):
        alone = for_model(model, kv_dtype)
        run(model, alone, streams[row][None])
        if row != 1:
            run(model, alone, *(ids[row : row + 1] for ids in turns))
        expected = run(model, alone, tiny.random_ids(1, batch_size=3, seed=50)[row : row + 1])
        torch.testing.assert_close(found[place : place + 1], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_removed_tokens_leave_nothing(model, kv_dtype):
    """Recent tokens that the removed ones have overwritten come from the quantized window."""
    ids, wrong = tiny.random_ids(90), tiny.random_ids(20, seed=7)
    cache, twin = for_model(model, kv_dtype), for_model(model, kv_dtype)
    run(model, cache, ids[:, :60], wrong)
    cache.crop(-15)
    cache.crop(-5)
    run(model, twin, ids[:, :60])
    expected, found = (run(model, each, *ids[:, 60:].split(1, dim=1)) for each in (twin, cache))
    error = (found - expected).pow(2).mean().sqrt() / expected.std()
    assert error < {"int8": 0.05, "int4": 0.35}[kv_dtype]


def test_memory_is_about_a_half_and_a_quarter():
    model = tiny.build(tiny.config("llama", hidden_size=256), dtype=torch.bfloat16)  # heads of 64 dimensions
    ids = tiny.random_ids(8)
    sizes = {}
    for kv_dtype in (None, *KV_DTYPES):
        cache = StreamingCache.for_model(model, num_kept=4, window=1020, kv_dtype=kv_dtype)
        run(model, cache, ids)
        sizes[kv_dtype] = cache.num_bytes
        run(model, cache, *ids.split(1, dim=1))
        assert cache.num_bytes == sizes[kv_dtype]
    assert sizes["int8"] <= 0.55 * sizes[None]
    assert sizes["int4"] <= 0.35 * sizes[None]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_heads_of_two_sizes_and_windows_of_the_layers(kv_dtype, tmp_path):
    model, ids = random_model(small_families.config("gemma4_text")), tiny.random_ids(90)
    expected, cache = run(model, for_model(model, None, window=40), ids), for_model(model, kv_dtype, window=40)
    found = run(model, cache, ids[:, :60], *ids[:, 60:].split(1, dim=1))
    assert 0 < (found - expected).pow(2).mean().sqrt() / expected.std() < {"int8": 0.05, "int4": 0.35}[kv_dtype]
    cache.save(tmp_path / "cache")
    assert torch.equal(run(model, StreamingCache.load(tmp_path / "cache", model), ids), run(model, cache, ids))


def test_losses_can_be_measured_with_quantized_keys_and_values(model):
    ids = tiny.random_ids(200)
    plain, int8, int4 = (
        torch.cat(list(stream_losses(model, ids, num_kept=3, window=WINDOW, chunk_size=16, kv_dtype=kv_dtype)), dim=1)
        for kv_dtype in (None, "int8", "int4")
    )
    assert 0 < (int8 - plain).abs().mean() < (int4 - plain).abs().mean()


def test_an_unknown_type_and_an_odd_head_size_are_errors(model):
    with pytest.raises(ValueError, match="kv_dtype is 'fp8': it must be 'int8', 'int4' or None"):
        for_model(model, "fp8")
    odd = tiny.build(tiny.config("mpt", hidden_size=20), dtype=torch.float32)
    with pytest.raises(ValueError, match="requires an even head size, the model has 5"):
        for_model(odd, "int4")


@pytest.mark.parametrize(
    "odd",
    [
        {"head_dim": 5},  # and not hidden_size / num_attention_heads
        {"head_dim": None, "hidden_size": 20},
        {"head_dim": 16, "v_head_dim": 5},
        {"qk_nope_head_dim": 8, "qk_rope_head_dim": 3, "v_head_dim": 8},
        {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 5},
        {"per_layer_config": [SimpleNamespace(head_dim=16), SimpleNamespace(head_dim=5)]},
    ],
)
def test_odd_sizes_of_any_keys_and_values_are_an_error(odd):
    config = SimpleNamespace(**{"hidden_size": 64, "num_attention_heads": 4} | odd)
    check_head_sizes(config, "int8")
    with pytest.raises(ValueError, match=r"requires an even head size, the model has (5|11)"):
        check_head_sizes(config, "int4")


@pytest.mark.parametrize("window", [33, 40, 100])
@pytest.mark.parametrize("lengths", [(150, 1, 1), (1,) * 150, (60, 1, 1, 50, 1, 1), (2, 1)])
def test_each_slot_holds_its_token_and_the_recent_ones_exactly(window, lengths):
    """Compared with the unquantized buffers of a first layer, whose inputs are the same."""
    model = tiny.build(tiny.config("llama", num_hidden_layers=1), dtype=torch.float32)
    ids, buffers = tiny.random_ids(sum(lengths)), {}
    for kv_dtype in (None, "int8"):
        cache = for_model(model, kv_dtype, window=window)
        run(model, cache, *ids.split(lengths, dim=1))
        num_seen = cache.streams.counters.num_seen
        buffers[kv_dtype] = cache.streams.layers[0].read(SimpleNamespace(recent=RecentTokens(cache.shape, num_seen)))
    tokens = cache.shape.tokens_in_slots(num_seen)[0]
    seen = len(ids[0])
    for expected, found in zip(buffers[None], buffers["int8"], strict=True):
        is_recent = (tokens >= 3) & (tokens >= seen - min(NUM_RECENT, window))
        is_visible = (tokens >= 3) & (tokens >= seen - window)
        torch.testing.assert_close(found[:, :, is_recent], expected[:, :, is_recent], rtol=0, atol=1e-5)
        step = expected.abs().amax(-1, keepdim=True) / 127
        error = (found - expected).abs() / step.clamp(min=1e-9)
        assert (error[:, :, is_visible] < 2.5).all()  # phases were moved once: rounded twice
        assert is_visible.sum() == min(window, max(seen - 3, 0))
