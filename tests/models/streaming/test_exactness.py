"""Token by token, in chunks, or in one pass: always the numbers of the streaming contract."""

import pytest
import torch
from sinklm.models.streaming import StreamingCache

from ..tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny

NUM_TOKENS = 40
SPLITS = {
    "token by token": [1] * NUM_TOKENS,
    "one pass": [NUM_TOKENS],
    "prompt within the cache, then tokens": [5] + [1] * (NUM_TOKENS - 5),
    "prompt beyond the cache, then tokens": [31] + [1] * (NUM_TOKENS - 31),
    "turns of a chat": [7, 1, 1, 1, 12, 1, 1, 2, 1, 13],
    "chunks that do not divide": [17, 17, 6],
}
CACHES = [(0, 5), (1, 4), (4, 9), (12, 3), (4, 36), (4, 100)]  # the last two are never full


@torch.no_grad()
def streamed(model, ids, cache, sizes):
    """Logits ``(B, T, V)`` of one stream fed in pieces of these sizes."""
    pieces = ids.split(sizes, dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def exact(request):
    """A model that works in float64 throughout, text, and what the oracle says."""
    model = tiny.build(tiny.config(request.param))
    tiny.use_float64(model)
    ids = tiny.random_ids(NUM_TOKENS)
    return model, ids, {shape: oracle.stream_logits(model, ids[0], *shape) for shape in CACHES}


@pytest.mark.parametrize(("num_kept", "window"), CACHES)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_equals_the_oracle(exact, num_kept, window, sizes):
    model, ids, expected = exact
    for chunk_size in (1024, 6):
        cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, chunk_size=chunk_size)
        logits = streamed(model, ids, cache, sizes)
        torch.testing.assert_close(logits[0], expected[num_kept, window], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_stock_models_differ_by_their_float32_tables_only(family):
    model = tiny.build(tiny.config(family))
    ids = tiny.random_ids(NUM_TOKENS)
    expected = oracle.stream_logits(model, ids[0], 4, 9)
    for sizes in SPLITS.values():
        cache = StreamingCache.for_model(model, num_kept=4, window=9)
        torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected, rtol=0, atol=5e-5)


def test_every_rotary_share_and_both_residuals():
    for rotary_share in (0.25, 0.5, 1.0):
        for parallel in (True, False):
            rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_share}
            cfg = tiny.config("gpt_neox", rope_parameters=rope, use_parallel_residual=parallel, hidden_size=64)
            model = tiny.build(cfg)
            tiny.use_float64(model)
            ids = tiny.random_ids(30)
            cache = StreamingCache.for_model(model, num_kept=2, window=6)
            logits = streamed(model, ids, cache, [14] + [1] * 16)
            torch.testing.assert_close(logits[0], oracle.stream_logits(model, ids[0], 2, 6), rtol=0, atol=1e-9)


def test_a_wrong_distance_would_show():
    """The models are sharp enough: the oracle itself moves if distances or tokens are off by one."""
    model = tiny.build(tiny.config("gpt_neox"))
    ids = tiny.random_ids(NUM_TOKENS)
    expected = oracle.stream_logits(model, ids[0], 4, 9)
    for shape in ((4, 8), (4, 10), (3, 10), (5, 8)):
        assert (oracle.stream_logits(model, ids[0], *shape) - expected)[20:].abs().max() > 1e-2


def test_a_models_own_sinks_are_the_first_tokens_of_its_stream():
    model = tiny_model(num_sinks=2)
    twin, ids = plain_twin(model), torch.randint(1, 300, (1, 40))
    expected = oracle.stream_logits(twin, torch.cat((sinks(model, 1), ids), dim=1)[0], 3, 7)[2:]
    for sizes in ([1] * 40, [40], [13] + [1] * 27):
        cache = StreamingCache.for_model(model, num_kept=3, window=7)
        torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected, rtol=0, atol=5e-5)
        assert cache.get_seq_length() == 42
