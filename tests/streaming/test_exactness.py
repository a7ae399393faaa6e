"""Token by token, in chunks or in one pass, the result is that of the streaming rule."""

from functools import cache as remember

import pytest
import torch

from sinklm.streaming import StreamingCache

from ..models.tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny

NUM_TOKENS = 40
SPLITS = {
    "token by token": [1] * 40,
    "one pass": [40],
    "prompt within the cache, then tokens": [5] + [1] * 35,
    "prompt beyond the cache, then tokens": [31] + [1] * 9,
    "turns of a chat": [7, 1, 1, 1, 12, 1, 1, 2, 1, 13],
    "chunks that do not divide": [17, 17, 6],
}
SHAPES = [(0, 5), (1, 4), (4, 9), (12, 3), (4, 36), (4, 100)]  # the last two are never full


@torch.no_grad()
def streamed(model, ids, cache, sizes):
    """Return the logits ``(B, T, V)`` of one stream that is read in pieces of these sizes."""
    pieces = ids.split(sizes, dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@remember
def exact(family):
    """A model that computes everything in float64, and text."""
    model = tiny.build(tiny.config(family))
    tiny.use_float64(model)
    return model, tiny.random_ids(NUM_TOKENS)


@remember
def expected(family, shape):
    model, ids = exact(family)
    return oracle.stream_logits(model, ids[0], *shape)


def check(family, shape, sizes, chunk_size=1024):
    model, ids = exact(family)
    cache = StreamingCache.for_model(model, num_kept=shape[0], window=shape[1], chunk_size=chunk_size)
    torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected(family, shape), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_cache_and_any_split_equal_the_oracle(shape, sizes):
    check("gpt_neox", shape, sizes)
    if max(sizes) > 6:
        check("gpt_neox", shape, sizes, chunk_size=6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 9)], ids=str)
def test_every_family_equals_the_oracle(family, shape):
    check(family, shape, [31] + [1] * 9)
    check(family, shape, [17, 17, 6])
    if shape == (4, 9):
        check(family, shape, [1] * 40)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stock_models_differ_by_their_float32_tables_only(family):
    model = tiny.build(tiny.config(family))
    ids = tiny.random_ids(NUM_TOKENS)
    expected = oracle.stream_logits(model, ids[0], 4, 9)
    for sizes in ([31] + [1] * 9, [17, 17, 6]):
        cache = StreamingCache.for_model(model, num_kept=4, window=9)
        torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["mpt", "falcon:rw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_are_as_accurate_in_half_precision_as_those_of_the_stock_model(family, dtype):
    """Also in a large cache with few tokens, where biases counted from its end are far from 0."""
    model, ids = tiny.build(tiny.config(family, max_seq_len=4096)), tiny.random_ids(120)
    exact = oracle.stream_logits(model, ids[0], 4, 4092)
    model = model.to(dtype)
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits[0]
    for sizes in ([120], [50] + [1] * 70):
        cache = StreamingCache.for_model(model, num_kept=4, window=4092)
        error = (streamed(model, ids, cache, sizes)[0] - exact).norm()
        assert error <= 1.3 * (stock - exact).norm()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_oracle_equals_the_stock_model_until_tokens_are_evicted(family):
    model = tiny.build(tiny.config(family))
    ids = tiny.random_ids(13)
    with torch.no_grad():
        dense = model(ids).logits[0]
    torch.testing.assert_close(oracle.stream_logits(model, ids[0], 4, 9), dense, rtol=0, atol=5e-5)


@pytest.mark.parametrize("rotary_share", [0.25, 0.5, 1.0])
def test_every_rotary_share(rotary_share):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_share}
    model = tiny.build(tiny.config("gpt_neox", rope_parameters=rope, hidden_size=64))
    tiny.use_float64(model)
    ids = tiny.random_ids(30)
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    logits = streamed(model, ids, cache, [14] + [1] * 16)
    torch.testing.assert_close(logits[0], oracle.stream_logits(model, ids[0], 2, 6), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt_neox", "mpt", "falcon:rw"])
def test_a_wrong_distance_would_change_the_logits(family):
    """The attention of the test models is sharp enough to reveal a cache that is off by one."""
    model, ids = exact(family)
    for shape in ((4, 8), (4, 10), (3, 10), (5, 8)):
        assert (oracle.stream_logits(model, ids[0], *shape) - expected(family, (4, 9)))[20:].abs().max() > 1e-2


def test_a_models_own_sinks_are_the_first_tokens_of_its_stream():
    model = tiny_model(num_sinks=2)
    twin, ids = plain_twin(model), torch.randint(1, 300, (1, 40))
    expected = oracle.stream_logits(twin, torch.cat((sinks(model, 1), ids), dim=1)[0], 3, 7)[2:]
    for sizes in ([1] * 40, [40], [13] + [1] * 27):
        cache = StreamingCache.for_model(model, num_kept=3, window=7)
        torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected, rtol=0, atol=5e-5)
        assert cache.get_seq_length() == 42
