"""The compiled step: one graph, and the same numbers."""

import pytest
import torch
from sinklm.models.streaming import StreamingCache, StreamingDecoder
from torch._dynamo.testing import CompileCounter

from ..tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@torch.no_grad()
def decoded(model, ids, prompt_length, num_kept, window):
    """Logits ``(T - prompt_length + 1, V)`` after the prompt and each further token, and the compiler's counter."""
    counter = CompileCounter()
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    decoder = StreamingDecoder(model, cache, compile={"backend": counter})
    logits = [decoder.prefill(ids[:, :prompt_length])]
    logits += [decoder(ids[:, t : t + 1]) for t in range(prompt_length, ids.shape[1])]
    return torch.cat(logits, dim=1)[0], counter


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "falcon", "falcon:rw", "mpt", "gptj"])
def test_a_stream_of_tokens_is_one_graph(family):
    model, ids = tiny.build(tiny.config(family)), tiny.random_ids(40)
    logits, counter = decoded(model, ids, 5, 2, 9)
    assert counter.frame_count == 1
    torch.testing.assert_close(logits, oracle.stream_logits(model, ids[0], 2, 9)[4:], rtol=0, atol=5e-5)


def test_a_model_with_sinks_is_one_graph_too():
    model, ids = tiny_model(num_sinks=2), torch.randint(1, 300, (1, 30))
    logits, counter = decoded(model, ids, 3, 2, 9)
    assert counter.frame_count == 1
    with_sinks = torch.cat((sinks(model, 1), ids), dim=1)[0]
    torch.testing.assert_close(logits, oracle.stream_logits(plain_twin(model), with_sinks, 2, 9)[4:], rtol=0, atol=5e-5)


def test_prompts_may_come_in_between_and_the_cache_may_be_reset():
    model, ids = tiny.build(tiny.config("gpt_neox")), tiny.random_ids(60)
    cache = StreamingCache.for_model(model, num_kept=2, window=9)
    decoder = StreamingDecoder(model, cache, compile={"backend": "eager"})
    expected = oracle.stream_logits(model, ids[0], 2, 9)
    for _ in range(2):
        with pytest.raises(ValueError, match="prefill"):
            decoder(ids[:, :1])
        end = 0
        for size in (3, 1, 1, 25, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 12, 1, 1):
            piece, end = ids[:, end : end + size], end + size
            logits = decoder(piece) if size == 1 else decoder.prefill(piece)
            torch.testing.assert_close(logits[0, -1], expected[end - 1], rtol=0, atol=5e-5)
        cache.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_equals_eager_steps(dtype):
    model = tiny.build(tiny.config("llama", hidden_size=128), dtype=dtype).cuda()
    ids = tiny.random_ids(80).cuda()
    cache = StreamingCache.for_model(model, num_kept=4, window=24)
    eager = StreamingCache.for_model(model, num_kept=4, window=24)
    decoder = StreamingDecoder(model, cache)
    decoder.prefill(ids[:, :9])
    with torch.no_grad():
        model(ids[:, :9], past_key_values=eager)
        for t in range(9, 80):
            expected = model(ids[:, t : t + 1], past_key_values=eager).logits
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2
            torch.testing.assert_close(decoder(ids[:, t : t + 1]), expected, rtol=tolerance, atol=tolerance)
    assert decoder.captured is not None
