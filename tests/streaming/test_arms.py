"""Arms without sink tokens in a stream: every query sees the sink, whatever is in the cache."""

from functools import cache as remember

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sinklm.models.arms import ARMS
from sinklm.models.banded_attention import merge_kept
from sinklm.models.sink_column import SinkColumn, merge_column
from sinklm.streaming import StreamingCache, StreamingDecoder

from ..models.tiny import text, tiny_arm, tiny_model
from . import oracle, tiny
from .test_batches import assert_rows_equal_the_oracle, rows
from .test_exactness import streamed

NUM_TOKENS = 40
SHAPES = [(0, 5), (1, 4), (4, 9), (4, 100)]  # rebased every 6, 5 and 10 tokens; the last is never full
SPLITS = {
    "token by token": [1] * 40,
    "one pass": [40],
    "prompt beyond the cache, then tokens": [31] + [1] * 9,
    "chunks that do not divide": [17, 17, 6],
}
every_arm = pytest.mark.parametrize("kind", ARMS)


@remember
def exact(kind):
    """A model that computes everything in float64, and text."""
    torch.manual_seed(0)
    model = tiny_arm(kind)
    tiny.use_float64(model)
    return model, text(1, NUM_TOKENS)


@remember
def expected(kind, shape):
    model, ids = exact(kind)
    return oracle.stream_logits(model, ids[0], *shape)


@every_arm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_cache_and_any_split_equal_the_oracle(kind, shape):
    model, ids = exact(kind)
    for sizes in SPLITS.values():
        for chunk_size in (1024, 6) if max(sizes) > 1 else (1024,):
            cache = StreamingCache.for_model(model, num_kept=shape[0], window=shape[1], chunk_size=chunk_size)
            logits = streamed(model, ids, cache, sizes)[0]
            torch.testing.assert_close(logits, expected(kind, shape), rtol=0, atol=1e-9)


@every_arm
def test_rows_of_unequal_length(kind):
    """A padded batch uses other masks, in chunks and in single steps."""
    turns = [rows(25, 12, 3), *(rows(1, 1, 1, seed=t) for t in range(9)), rows(2, 9, 20, seed=50), rows(1, 1, 1)]
    assert_rows_equal_the_oracle(exact(kind)[0], turns, 2, 6, tolerance=1e-9)


@every_arm
def test_a_sink_without_a_token_uses_no_cache(kind):
    sizes = []
    for model in (tiny_arm(kind), tiny_model(0)):
        cache = StreamingCache.for_model(model, num_kept=0, window=9)
        streamed(model, text(1, 20), cache, [20])
        sizes.append((cache.num_bytes, cache.get_seq_length()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["kv_bias", "gate", "head_gate"])
def test_a_stream_of_tokens_is_one_graph(kind):
    model, ids = exact(kind)
    torch._dynamo.reset()
    counter = CompileCounter()
    cache = StreamingCache.for_model(model, num_kept=1, window=9)
    decoder = StreamingDecoder(model, cache, compile={"backend": counter})
    logits = [decoder.prefill(ids[:, :5])] + [decoder(ids[:, t : t + 1]) for t in range(5, NUM_TOKENS)]
    assert counter.frame_count == 1
    expected = oracle.stream_logits(model, ids[0], 1, 9)[4:]
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_kept", [0, 3])
@pytest.mark.parametrize("has_value", [False, True])
def test_a_column_merged_into_a_band_is_one_softmax_over_all(num_kept, has_value):
    query, key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8)
    scores = query @ key.transpose(-1, -2)
    band, kept = scores[..., num_kept:], scores[..., :num_kept]
    column = SinkColumn(torch.tensor([[4.0], [0.0], [-4.0]]), torch.randn(3, 8) if has_value else None)
    out, lse = merge_column(band.softmax(-1) @ value[:, :, num_kept:], band.logsumexp(-1), column)
    merged = merge_kept(out, lse, kept, value[:, :, :num_kept])
    everything = torch.cat((scores, column.score.expand(2, 3, 7)[..., None]), dim=-1).softmax(-1)
    expected = everything[..., :-1] @ value
    if column.value is not None:
        expected += everything[..., -1:] * column.value[:, None]
    torch.testing.assert_close(merged, expected)


@pytest.mark.gpu
@every_arm
@pytest.mark.parametrize("num_kept", [0, 1, 4])
def test_flash_chunks_are_as_near_to_float64_as_single_tokens(kind, num_kept):
    model, ids = tiny_arm(kind, hidden_size=128), text(1, 90)
    exact = oracle.stream_logits(model, ids[0], num_kept, 24)
    model, ids = model.to("cuda", torch.bfloat16), ids.cuda()
    errors = []
    for sizes in ([90], [7, 40, 1, 42], [1] * 90):
        cache = StreamingCache.for_model(model, num_kept=num_kept, window=24)
        logits = streamed(model, ids, cache, sizes)[0]
        errors.append((logits.cpu().double() - exact).norm())
    assert max(errors[:2]) <= 1.5 * errors[2]
