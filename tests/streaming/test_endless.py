"""Streams without a length limit: the error does not grow with the length."""

import pytest
import torch

from sinklm.streaming import StreamingCache, stream_logits, stream_losses

from . import oracle, tiny

NUM_KEPT, WINDOW = 2, 9


def error_after(model, num_tokens):
    """Return the largest error of the last logits after ``num_tokens``, for a model with one layer.

    With one layer, logits depend only on the kept tokens and the window, so the oracle needs no
    other tokens.
    """
    head, tail = tiny.random_ids(NUM_KEPT), tiny.random_ids(40, seed=2)
    filler = tiny.random_ids(num_tokens - NUM_KEPT - 40, seed=3)
    cache = StreamingCache.for_model(model, num_kept=NUM_KEPT, window=WINDOW, chunk_size=512)
    with torch.no_grad():
        model.base_model(torch.cat((head, filler), dim=1), past_key_values=cache)
        logits = torch.cat([model(tail[:, t : t + 1], past_key_values=cache).logits for t in range(40)], dim=1)
    expected = oracle.stream_logits(model, torch.cat((head, tail), dim=1)[0], NUM_KEPT, WINDOW)
    assert cache.get_seq_length() == num_tokens
    return (logits[0, 20:] - expected[NUM_KEPT + 20 :]).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [100_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_the_error_after_many_tokens_is_not_larger_than_after_a_thousand(num_tokens):
    model = tiny.build(tiny.config("gpt_neox", num_hidden_layers=1, hidden_size=16, num_attention_heads=1))
    early, late = error_after(model, 1_000), error_after(model, num_tokens)
    assert early < 5e-6
    assert late < 2 * early


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_phases_stay_within_twice_the_cache(family):
    model = tiny.build(tiny.config(family))
    cache = StreamingCache.for_model(model, num_kept=NUM_KEPT, window=WINDOW)
    positions = []
    model.base_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append([*args, *kwargs.values()][1]), with_kwargs=True
    )
    with torch.no_grad():
        for size in [1] * 60 + [30] + [1] * 30:
            model(tiny.random_ids(size), past_key_values=cache)
    assert all(int(p.min()) >= 0 for p in positions)
    assert max(int(p.max()) for p in positions if p.shape[-1] == 1) <= 2 * (NUM_KEPT + WINDOW + 1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gpt_neox", torch.float32), ("gpt_neox", torch.bfloat16), ("gemma3_text", torch.bfloat16)],
)
def test_half_precision_does_not_drift(dtype, family):
    """Rotated keys are rounded once, so the error of a bfloat16 stream does not grow."""
    one_layer = {"num_hidden_layers": 1} if family == "gpt_neox" else {}
    model = tiny.build(tiny.config(family, **one_layer), dtype=dtype)
    ids = tiny.random_ids(300)
    cache = StreamingCache.for_model(model, num_kept=NUM_KEPT, window=WINDOW)
    with torch.no_grad():
        logits = torch.cat([model(i, past_key_values=cache).logits for i in ids.split(1, dim=1)], dim=1)[0].double()
    expected = oracle.stream_logits(model.double(), ids[0], NUM_KEPT, WINDOW)
    error = (logits - expected).abs().amax(-1)
    assert error[200:].mean() < 1.5 * error[12:100].mean()


def test_losses_over_a_large_vocabulary_are_accurate():
    """Sums over another dimension had errors of 7e-6 here and 3e-4 in a real model."""
    model = tiny.build(tiny.config("gpt_neox", num_hidden_layers=1, vocab_size=50_000), dtype=torch.float32)
    ids = tiny.random_ids(20)
    settings = {"num_kept": 1, "window": 5}
    losses = torch.cat(list(stream_losses(model, ids, **settings)), dim=1)
    logits = torch.cat(list(stream_logits(model, ids, **settings)), dim=1).double()
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses[0].double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("chunk_size", [7, 16, 64])
def test_losses_of_a_long_text_are_those_of_the_oracle(chunk_size):
    model = tiny.build(tiny.config("llama"))
    ids = torch.cat((tiny.random_ids(50), tiny.random_ids(50, seed=2)))
    settings = {"num_kept": 4, "window": 9, "chunk_size": chunk_size}
    losses = torch.cat(list(stream_losses(model, ids, **settings)), dim=1)
    chunks = list(stream_logits(model, ids, **settings))
    assert [chunk.shape[:2] for chunk in chunks] == [(2, min(chunk_size, 50 - i)) for i in range(0, 50, chunk_size)]
    logits = torch.cat(chunks, dim=1)
    assert losses.shape == (2, 49)
    for b in range(2):
        expected = oracle.stream_logits(model, ids[b], 4, 9)
        torch.testing.assert_close(logits[b], expected, rtol=0, atol=5e-5)
        by_oracle = torch.nn.functional.cross_entropy(expected[:-1], ids[b, 1:], reduction="none")
        torch.testing.assert_close(losses[b].double(), by_oracle, rtol=0, atol=5e-5)


@pytest.mark.parametrize("ids", [torch.ones(9, dtype=torch.long), [[1, 2, 3]]])
def test_a_text_without_a_dimension_of_streams_is_an_error(ids):
    model = tiny.build(tiny.config("llama", num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"token_ids is (of shape \(9,\)|a list): pass a tensor of shape \(streams, to"
    ):
        next(stream_losses(model, ids, num_kept=1, window=4))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"has 0 values of torch\.int64: pass at least one integer id"),
        (torch.zeros(1, 9), r"has 9 values of torch\.float32: pass at least one integer id"),
        (torch.zeros(1, 1, dtype=torch.long), "has one token: pass at least two, because the first one is not scored"),
        (torch.full((1, 9), 99_999), "token id 99999 is outside of the model's vocabulary"),
    ],
)
def test_ids_that_cannot_be_scored_are_an_error(ids, message):
    model = tiny.build(tiny.config("llama"))
    with pytest.raises(ValueError, match=message):
        next(stream_losses(model, ids, num_kept=1, window=4))
