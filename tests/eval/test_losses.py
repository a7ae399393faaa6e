"""Per-token losses against slow reference computations."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from transformers import GPT2Config, GPTNeoXConfig

from sinklm.eval import losses
from sinklm.models.arms import ARMS

from ..models.tiny import as_export, plain_twin, sinks, text, tiny_arm, tiny_model
from ..streaming.oracle import stream_logits

NUM_TOKENS = 40


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Chunk sizes that divide neither the text nor each other, to test every boundary."""
    monkeypatch.setattr(losses, "CHUNK", 7)
    monkeypatch.setattr(losses, "RECOMPUTE_TOKENS", 30)


def by_hand(logits: torch.Tensor, ids: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """Losses ``(T,)`` from logits ``(n + T, V)`` of sinks and text; NaN without context."""
    log_probs = logits.log_softmax(-1)
    return torch.stack(
        [
            -log_probs[num_sinks + t - 1, token] if num_sinks + t else torch.tensor(float("nan"), dtype=logits.dtype)
            for t, token in enumerate(ids)
        ]
    )


def whole_stream(model, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([sinks(model, 1)[0], ids])


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize(("num_kept", "window"), [(0, 9), (1, 8), (4, 5), (2, 60)])
def test_stream_losses_follow_the_streaming_contract(num_sinks, num_kept, window):
    model, ids = tiny_model(num_sinks), text(1, NUM_TOKENS)[0]
    logits = stream_logits(plain_twin(model), whole_stream(model, ids), num_kept, window)

    measured = losses.streaming_losses(model, ids, num_kept, window)

    assert measured.dtype == torch.float64
    # transformers' rotary tables are float32 even in float64 models
    torch.testing.assert_close(measured, by_hand(logits, ids, num_sinks), equal_nan=True, rtol=0, atol=1e-4)
    assert measured.isnan().sum() == (0 if num_sinks else 1)


@pytest.mark.parametrize("kind", ARMS)
def test_an_arm_streams_by_the_same_contract(kind):
    model, ids = tiny_arm(kind), text(1, NUM_TOKENS)[0]
    for num_kept, window in ((0, 9), (4, 5)):
        measured = losses.streaming_losses(model, ids, num_kept, window)
        expected = by_hand(stream_logits(model, ids, num_kept, window), ids, 0)
        torch.testing.assert_close(measured, expected, equal_nan=True, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_dense_losses_are_those_of_one_forward_pass(num_sinks):
    model, ids = tiny_model(num_sinks), text(1, NUM_TOKENS)[0]
    with torch.no_grad():
        logits = plain_twin(model)(whole_stream(model, ids)[None]).logits[0]

    measured = losses.dense_losses(model, ids)

    torch.testing.assert_close(measured, by_hand(logits, ids, num_sinks), equal_nan=True, rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(num_kept=st.integers(0, 6), window=st.integers(1, 40), num_tokens=st.integers(2, 30))
def test_a_cache_that_never_fills_is_dense_attention(num_kept, window, num_tokens):
    model, ids = tiny_model(1), text(1, num_tokens)[0]
    num_full = min(
        num_kept + window, num_tokens
    )  # one of the cached tokens is the sink, and a query also attends to itself

    stream, dense = losses.streaming_losses(model, ids, num_kept, window), losses.dense_losses(model, ids)

    torch.testing.assert_close(stream[:num_full], dense[:num_full], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_models_with_and_without_sinks_and_exports_are_scored_up_to_the_same_token(num_sinks):
    model = tiny_model(num_sinks, max_position_embeddings=16)
    ids = text(1, 16 * losses.DENSE_LENGTHS + 5)[0]

    ours = losses.dense_losses(model, ids)
    exported = losses.dense_losses(as_export(model), whole_stream(model, ids), num_sinks)[num_sinks:]

    assert ours[1:-5].isfinite().all()
    assert ours[-5:].isnan().all()
    torch.testing.assert_close(ours[1:], exported[1:], equal_nan=True, rtol=0, atol=1e-4)


def test_dense_attention_stops_where_memory_ends(monkeypatch):
    model, ids = tiny_model(1), text(1, NUM_TOKENS)[0]
    whole = losses.dense_losses(model, ids)
    monkeypatch.setattr(losses, "_free_memory", lambda device: 0)

    measured = losses.dense_losses(model, ids)

    torch.testing.assert_close(measured[:8], whole[:8])
    assert measured[8:].isnan().all()


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("every", [1, 3])
def test_recompute_losses_run_a_new_window_for_each_token(num_sinks, num_prefix, every):
    model, ids, num_keys = tiny_model(num_sinks), text(1, NUM_TOKENS)[0], 12
    twin, num_recent = plain_twin(model), num_keys - num_prefix - num_sinks
    num_head = num_prefix + num_recent
    expected = torch.full((NUM_TOKENS,), float("nan"), dtype=torch.float64)
    for t in range(0 if num_sinks else 1, NUM_TOKENS):
        if t - num_prefix <= num_keys or (t - num_prefix) % every == 0:
            recent = ids[:t] if t <= num_head else torch.cat([ids[:num_prefix], ids[t - num_recent : t]])
            with torch.no_grad():
                logits = twin(whole_stream(model, recent)[None]).logits[0, -1]
            expected[t] = nn.functional.cross_entropy(logits, ids[t])

    measured = losses.recompute_losses(model, ids, num_keys, num_prefix=num_prefix, every=every)

    torch.testing.assert_close(measured, expected, equal_nan=True, rtol=0, atol=1e-6)


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="leaves no room for text"):
        losses.recompute_losses(tiny_model(2), text(1, 20)[0], num_keys=3, num_prefix=1)


@pytest.mark.parametrize("num_tokens", [2, 5, 12, 13, 40])
def test_progress_counts_every_token_once(num_tokens):
    model, ids = tiny_model(1), text(1, num_tokens)[0]
    for measure in (
        lambda progress: losses.streaming_losses(model, ids, 1, 5, progress),
        lambda progress: losses.dense_losses(model, ids, progress=progress),
        lambda progress: losses.recompute_losses(model, ids, 12, progress=progress),
    ):
        done: list[int] = []
        measure(done.append)
        assert sum(done) == num_tokens - 1


@pytest.mark.parametrize("num_inputs", [3, 47, 48, 500])
def test_dense_attention_reads_so_many_trained_lengths_or_all_embedded_positions(num_inputs):
    def limit(config, num_prefix=0):
        return losses.num_dense_inputs(SimpleNamespace(config=config), num_inputs, 3, num_prefix)

    trained = GPTNeoXConfig(max_position_embeddings=16)
    assert (limit(trained), limit(trained, 2)) == (min(num_inputs, 47), min(num_inputs, 49))
    assert limit(GPT2Config(n_positions=16)) == min(num_inputs, 16)
    assert limit(SimpleNamespace(model_type="other")) == num_inputs
