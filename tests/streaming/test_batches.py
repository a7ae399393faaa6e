"""Rows of a batch are independent streams without their padding, and can be reordered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinklm.streaming import StreamingCache

from ..models.tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny

PAD = 0


def pad_left(rows, length=None):
    """``(B, T)`` ids and mask."""
    length = length or max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=PAD) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def assert_rows_equal_the_oracle(model, turns, num_kept, window, chunk_size=1024, tolerance=5e-5):
    """Compare every row's logits with those of its own stream; a turn is a list of rows."""
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, chunk_size=chunk_size)
    logits = []
    for rows in turns:
        ids, mask = pad_left(rows)
        out = model(ids, attention_mask=mask, past_key_values=cache).logits
        logits.append([out[b, len(mask[b]) - len(row) :] for b, row in enumerate(rows)])
    for b in range(len(turns[0])):
        stream = torch.cat([rows[b] for rows in turns])
        expected = oracle.stream_logits(model, stream, num_kept, window)
        torch.testing.assert_close(torch.cat([turn[b] for turn in logits]), expected, rtol=0, atol=tolerance)


def rows(*lengths, seed=0):
    return [tiny.random_ids(n, seed=seed + 10 * i)[0] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma3_text", "falcon:rw", "mpt", "gptj"])
def test_left_padded_rows_stream_as_they_would_alone(family):
    model = tiny.build(tiny.config(family))
    turns = [rows(25, 12, 3), *(rows(1, 1, 1, seed=t) for t in range(12)), rows(2, 9, 20, seed=50), rows(1, 1, 1)]
    assert_rows_equal_the_oracle(model, turns, 3, 7)
    assert_rows_equal_the_oracle(model, turns, 3, 7, chunk_size=8)  # the first chunks of a row may be all padding


@settings(max_examples=15)
@given(data=st.data(), num_kept=st.integers(0, 5), window=st.integers(1, 9), chunk_size=st.integers(1, 12))
def test_any_turns_of_any_lengths(data, num_kept, window, chunk_size):
    model = tiny.build(tiny.config("gpt_neox", num_hidden_layers=1))
    lengths = st.tuples(st.integers(1, 14), st.integers(1, 14))
    turns = [rows(*data.draw(lengths), seed=t) for t in range(data.draw(st.integers(1, 5)))]
    assert_rows_equal_the_oracle(model, turns, num_kept, window, chunk_size)


def test_padding_fed_token_by_token_is_not_counted():
    model = tiny.build(tiny.config("gpt_neox"))
    streams = rows(20, 13)
    ids, mask = pad_left(streams)
    cache = StreamingCache.for_model(model, num_kept=2, window=5)
    with torch.no_grad():
        pieces = [model(ids[:, t : t + 1], mask[:, : t + 1], past_key_values=cache).logits for t in range(20)]
    logits = torch.cat(pieces, dim=1)
    for b, stream in enumerate(streams):
        expected = oracle.stream_logits(model, stream, 2, 5)
        torch.testing.assert_close(logits[b, -len(stream) :], expected, rtol=0, atol=5e-5)


def test_sinks_stay_in_front_of_padding():
    """The model prepends its sinks to the padding: the mask has a gap, the stream has none."""
    model = tiny_model(num_sinks=1)
    streams = [torch.randint(1, 300, (n,)) for n in (18, 7)]
    ids, mask = pad_left(streams)
    cache = StreamingCache.for_model(model, num_kept=1, window=6)
    with torch.no_grad():
        logits = model(ids, mask, past_key_values=cache).logits
    for b, stream in enumerate(streams):
        with_sink = torch.cat((sinks(model, 1)[0], stream))
        expected = oracle.stream_logits(plain_twin(model), with_sink, 1, 6)[1:]
        torch.testing.assert_close(logits[b, -len(stream) :], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_a_row_may_begin_in_a_later_pass(num_sinks):
    """Its first pass consists of padding only, after the model's sinks."""
    model = tiny_model(num_sinks)
    cache = StreamingCache.for_model(model, num_kept=max(num_sinks, 1), window=6)
    turns = [
        [torch.randint(1, 300, (n,)) for n in lengths] for lengths in ((9, 0, 4), (0, 0, 3), (12, 5, 1), (1, 1, 1))
    ]
    logits, seen = [], torch.ones(3, 0, dtype=torch.long)
    for streams in turns:
        ids, mask = pad_left(streams)
        seen = torch.cat((seen, mask), dim=1)
        with torch.no_grad():
            logits.append(model(ids, seen, past_key_values=cache).logits)
    for b in range(3):
        stream = torch.cat([streams[b] for streams in turns])
        with_sinks = torch.cat((sinks(model, 1)[0], stream))
        expected = oracle.stream_logits(plain_twin(model), with_sinks, max(num_sinks, 1), 6)[num_sinks:]
        found = torch.cat(
            [out[b, out.shape[1] - len(streams[b]) :] for out, streams in zip(logits, turns, strict=True)]
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("num_sinks", [0, 1])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 1, 0]]), "row 0 of the batch has padding on the right"),
        (torch.tensor([[0.0, 0.0, -1e9, 0.0]]), "values other than 0 "),
        (torch.full((1, 4), 2), "values other than 0 "),
        (torch.ones(1, 3), "attention_mask"),
        (torch.ones(2, 4), "attention_mask has shape"),
        (torch.ones(1, 1, 4, 4), "attention_mask has"),
    ],
)
def test_a_wrong_mask_is_an_error(num_sinks, mask, message):
    model = tiny_model(num_sinks)
    cache = StreamingCache.for_model(model, num_kept=1, window=6)
    with pytest.raises(ValueError, match=message):
        model(torch.randint(1, 300, (1, 4)), attention_mask=mask, past_key_values=cache)
    assert not cache.is_initialized


@torch.no_grad()
def test_rows_can_be_reordered_repeated_and_selected():
    model = tiny.build(tiny.config("llama"))
    ids = tiny.random_ids(20, batch_size=3)
    after = tiny.random_ids(5)

    def continuation(cache, batch_size):
        return model(after.expand(batch_size, -1), past_key_values=cache).logits

    def cache():
        cache = StreamingCache.for_model(model, num_kept=2, window=6)
        model(ids, past_key_values=cache)
        return cache

    plain = continuation(cache(), 3)
    reordered, repeated, selected = cache(), cache(), cache()
    reordered.reorder_cache(torch.tensor([2, 0, 0]))
    repeated.batch_repeat_interleave(2)
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(continuation(reordered, 3), plain[[2, 0, 0]])
    torch.testing.assert_close(continuation(repeated, 6), plain.repeat_interleave(2, dim=0))
    torch.testing.assert_close(continuation(selected, 1), plain[[1]])
