"""Models with windowed layers: the forward pass of training is a stream of the same windows."""

import copy
import warnings
from functools import cache as remember

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from sinklm.models.arms import ARMS
from sinklm.models.cache_argument import CACHE
from sinklm.streaming import StreamingCache, StreamingDecoder, default_cache, stream_losses
from sinklm.streaming.layers import describe_rules

from ..models.tiny import draw_sinks, text, tiny_model
from . import oracle, tiny
from .test_batches import assert_rows_equal_the_oracle, rows
from .test_exactness import streamed

NUM_TOKENS = 30
NO_LIMIT = 100  # a window in which full layers see everything, as in training
PATTERNS = {
    "all alike": [5, 5],
    "hybrid": [4, None],
    "two windows": [7, 3],
    "full first": [None, 6],
    "longer than the text": [29, 64],
}
SPLITS = ([1] * NUM_TOKENS, [NUM_TOKENS], [17, 1, 1, 11], [3, 3, 1, 9, 14])
KINDS = ["none", "token", "two tokens", "four tokens", *ARMS]
NUM_SINKS = {"token": 1, "two tokens": 2, "four tokens": 4}
# Every pair of a kind, a pattern and a number of kept tokens.
CASES = [
    (kind, pattern, max((0, 1, 2, 4)[(k + p) % 4], NUM_SINKS.get(kind, 0)))
    for k, kind in enumerate(KINDS)
    for p, pattern in enumerate(PATTERNS)
]


def new_model(kind: str, pattern: str, num_kept: int, **settings):
    torch.manual_seed(0)
    num_sinks = NUM_SINKS.get(kind, 0)
    settings |= {} if num_sinks else {"sink": {"kind": kind}}
    model = tiny_model(num_sinks, **{"layer_windows": PATTERNS[pattern], "num_kept": num_kept} | settings)
    draw_sinks(model)
    return model


@remember
def windowed(kind: str, pattern: str, num_kept: int):
    """A model that computes everything in float64."""
    model = new_model(kind, pattern, num_kept)
    tiny.use_float64(model)
    return model


@torch.no_grad()
def trained(model, ids, **options):
    """Logits of the forward pass of training."""
    return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize(("kind", "pattern", "num_kept"), CASES)
def test_training_is_a_stream_with_the_same_windows(kind, pattern, num_kept):
    model, ids = windowed(kind, pattern, num_kept), text(1, NUM_TOKENS)
    cache = StreamingCache.for_model(model, num_kept=4, window=NO_LIMIT)
    found = streamed(model, ids, cache, [1] * NUM_TOKENS)
    torch.testing.assert_close(found, trained(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "pattern", "num_kept"), CASES)
def test_chunks_in_float32(kind, pattern, num_kept):
    model, ids = new_model(kind, pattern, num_kept).float(), text(1, NUM_TOKENS)
    cache = StreamingCache.for_model(model, num_kept=4, window=NO_LIMIT, chunk_size=8 if num_kept == 1 else 1024)
    expected, found = trained(model, ids), streamed(model, ids, cache, [13, 1, 1, 15])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


HYBRID = ("kv_bias", "hybrid", 2)


@pytest.mark.parametrize("shape", [(0, 6), (1, 5), (4, 2), (4, 9)], ids=str)
def test_any_cache_and_any_split_equal_the_oracle(shape):
    """Layers keep at most what they were trained with, and at most what the cache has."""
    for kind, pattern in (("kv_bias", "hybrid"), ("logit", "two windows")):
        model, ids = windowed(kind, pattern, 2), text(1, NUM_TOKENS)
        expected = oracle.stream_logits(model, ids[0], *shape)
        for sizes in SPLITS:
            cache = StreamingCache.for_model(model, num_kept=shape[0], window=shape[1], chunk_size=8)
            torch.testing.assert_close(streamed(model, ids, cache, sizes)[0], expected, rtol=0, atol=1e-9)


@settings(max_examples=8)
@given(data=st.data(), num_kept=st.integers(0, 4), window=st.integers(1, 9), chunk_size=st.integers(1, 12))
def test_any_turns_of_any_lengths(data, num_kept, window, chunk_size):
    lengths = st.tuples(st.integers(1, 14), st.integers(1, 14))
    turns = [rows(*data.draw(lengths), seed=t) for t in range(data.draw(st.integers(1, 5)))]
    assert_rows_equal_the_oracle(windowed(*HYBRID), turns, num_kept, window, chunk_size, tolerance=1e-9)


@torch.no_grad()
def test_rows_start_again_and_copies_and_files_continue(tmp_path):
    """Each operation on a cache applies to all groups of layers."""
    model, first, more = windowed("token", "hybrid", 2), text(3, 21), text(3, 13)
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    model(first, **{CACHE: cache})
    cache.reset([1])
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.save(tmp_path / "cache")
    for twin in (StreamingCache.load(tmp_path / "cache", model), copy.deepcopy(cache), cache):
        found = torch.cat([model(ids, **{CACHE: twin}).logits for ids in more.split([1] * 9 + [4], dim=1)], dim=1)
        for row, before in enumerate((first[2], first[1, :0], first[0])):
            alone = StreamingCache.for_model(model, num_kept=2, window=6)
            stream = torch.cat((before, more[row]))[None]
            expected = model(stream, **{CACHE: alone}).logits[0, len(before) :]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_tokens_can_be_removed_until_one_has_left_the_smallest_window():
    model, ids = windowed("kv_bias", "hybrid", 1), text(1, 12)
    cache = StreamingCache.for_model(model, num_kept=1, window=9)
    model(ids[:, :6], **{CACHE: cache})
    assert cache.is_croppable
    cache.crop(-2)
    found = model(ids[:, 4:], **{CACHE: cache}).logits
    expected = oracle.stream_logits(model, ids[0], 1, 9)[4:]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-9)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"left the cache of 1\+9 \(1 of 2 layers 1\+4\)"):
        cache.crop(-1)


@torch.no_grad()
def test_quantized_windows_stay_exact_while_their_tokens_are_recent():
    model, ids = new_model(*HYBRID).float(), text(1, 30)
    plain, quantized = (
        StreamingCache.for_model(model, num_kept=2, window=40, kv_dtype=kv_dtype) for kv_dtype in (None, "int8")
    )
    for piece in ids.split([5, 20, 1, 1, 3], dim=1):
        expected, found = (model(piece, **{CACHE: cache}).logits for cache in (plain, quantized))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_step_is_one_graph():
    torch._dynamo.reset()
    model, ids, counter = windowed(*HYBRID), text(1, NUM_TOKENS), CompileCounter()
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    decoder = StreamingDecoder(model, cache, compile={"backend": counter})
    logits = [decoder.prefill(ids[:, :5])] + [decoder(ids[:, t : t + 1]) for t in range(5, NUM_TOKENS)]
    assert counter.frame_count == 1
    expected = oracle.stream_logits(model, ids[0], 2, 6)[4:]
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=0, atol=1e-9)


def test_losses_of_a_long_text_are_those_of_its_windows():
    model, ids = windowed("token", "all alike", 1), text(2, 60)
    expected = torch.nn.functional.cross_entropy(
        trained(model, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    losses = torch.cat(list(stream_losses(model, ids, num_kept=4, window=50, chunk_size=7)), dim=1)
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-5)


def test_a_cache_says_which_layers_have_windows_of_their_own():
    model = windowed("kv_bias", "two windows", 2)
    cache = StreamingCache.for_model(model, num_kept=4, window=6)
    assert repr(cache) == "StreamingCache(num_kept=4, window=6, 1 of 2 layers 2+6, 1 of 2 layers 2+3, seen=0)"
    cache = StreamingCache.for_model(windowed("kv_bias", "hybrid", 2), num_kept=2, window=4)
    assert repr(cache) == "StreamingCache(num_kept=2, window=4, seen=0)"


def test_reports_name_the_windows_of_a_model():
    assert describe_rules(new_model(*HYBRID).config) == "1 of 2 layers 2+4"
    assert describe_rules(new_model("token", "two windows", 1).config) == "1 of 2 layers 1+7, 1 of 2 layers 1+3"
    assert describe_rules(tiny_model(1).config) is None


@pytest.mark.parametrize(
    ("kind", "num_kept", "default"), [("token", 1, 1), ("token", 3, 3), ("none", 1, 4), ("none", 6, 6)]
)
def test_a_default_cache_keeps_what_windowed_layers_keep(kind, num_kept, default):
    assert default_cache(new_model(kind, "hybrid", num_kept))[0] == default


def test_a_cache_larger_than_the_trained_length_warns_only_if_a_layer_has_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StreamingCache.for_model(windowed("none", "all alike", 1), num_kept=1, window=500)
    with pytest.warns(UserWarning, match=r"the cache 1\+500 is too large for the 128 positions"):
        StreamingCache.for_model(windowed("none", "hybrid", 1), num_kept=1, window=500)


@pytest.mark.parametrize(("kind", "num_kept", "given"), [("none", 4, 1), ("token", 1, 0)])
def test_fewer_kept_tokens_than_the_windowed_layers_were_trained_with_give_a_warning(kind, num_kept, given):
    model = windowed(kind, "hybrid", num_kept)
    kept = "1 kept token" if num_kept == 1 else f"{num_kept} kept tokens"
    expected = f"trained with {kept}, and this cache keeps {given}: use num_kept={num_kept} or more"
    with pytest.warns(UserWarning, match=expected):
        StreamingCache.for_model(model, num_kept=given, window=20)
    with warnings.catch_warnings(action="error"):
        StreamingCache.for_model(model, num_kept=num_kept, window=20)


def test_another_window_for_one_pass_is_an_error():
    model = windowed(*HYBRID)
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    with pytest.raises(ValueError, match="create the StreamingCache with a smaller window"):
        model(text(1, 4), window=3, **{CACHE: cache})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["hybrid", "two windows"])
def test_flash_chunks_and_the_kernel_are_as_near_to_float64_as_a_training_pass(kind, pattern):
    windows = [window and 4 * window for window in PATTERNS[pattern]]
    model, ids = new_model(kind, pattern, NUM_SINKS.get(kind, 2), layer_windows=windows, hidden_size=128), text(1, 90)
    exact = trained(model, ids)[0]
    model, ids = model.to("cuda", torch.bfloat16), ids.cuda()
    model.gpt_neox.rotary_emb = GPTNeoXRotaryEmbedding(model.config).cuda()  # its frequencies stay float32
    dense = (trained(model, ids)[0].cpu().double() - exact).norm()
    for sizes in ([90], [7, 40, 1, 42], [1] * 90):
        cache = StreamingCache.for_model(model, num_kept=4, window=NO_LIMIT)
        error = (streamed(model, ids, cache, sizes)[0].cpu().double() - exact).norm()
        assert error <= 1.5 * dense


@pytest.mark.gpu
def test_a_captured_graph_of_groups_equals_eager_steps():
    model, ids = new_model("logit", "two windows", 2).float().cuda(), text(2, 60).cuda()
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=3, window=9))
    eager = StreamingCache.for_model(model, num_kept=3, window=9)
    captured, stepped = [decoder.prefill(ids[:, :4])], []
    with torch.no_grad():
        stepped.append(model(ids[:, :4], **{CACHE: eager}).logits[:, -1:])
        for t in range(4, 60):
            captured.append(decoder(ids[:, t : t + 1]).clone())
            stepped.append(model(ids[:, t : t + 1], **{CACHE: eager}).logits)
    assert decoder.captured is not None
    expected = torch.cat(stepped, dim=1)
    difference = (torch.cat(captured, dim=1) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()
