"""The generation loop compared with `generate`, sampling, and decoding text token by token."""

import math
import warnings
from itertools import islice

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import DynamicCache, PreTrainedTokenizerFast

from sinklm.eval import decode_speed, perplexity, stream_qa
from sinklm.streaming import Generator, StreamingCache, TextStream, default_cache
from sinklm.streaming.generation import MAX_PENDING
from sinklm.streaming.sampling import Sampling

from ..eval.checkpoints import small_tokenizer
from ..models.tiny import FIRST_SINK, as_export, text, tiny_model

MODEL = tiny_model(num_sinks=0)
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="<|endoftext|>")


def generator(model, num_kept=2, window=9, **sampling) -> Generator:
    return Generator(model, StreamingCache.for_model(model, num_kept=num_kept, window=window), **sampling)


@pytest.mark.parametrize("num_sinks", [0, 2])
@pytest.mark.parametrize("prompt_length", [1, 5, 30])
def test_the_loop_writes_the_same_text_as_generate(num_sinks, prompt_length):
    model, ids = tiny_model(num_sinks), text(1, prompt_length)
    cache = StreamingCache.for_model(model, num_kept=2, window=9)
    expected = model.generate(
        ids, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    written = list(islice(generator(model)(ids[0].tolist()), 40))
    assert written == expected[0, prompt_length:].tolist()


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_the_captured_step_writes_the_same():
    model, ids = tiny_model(num_sinks=1).cuda(), text(1, 30)[0].tolist()
    eager, captured = (list(islice(generator(model, compile=compile)(ids), 60)) for compile in (False, True))
    assert captured == eager


def test_a_sink_is_never_sampled():
    model = tiny_model(num_sinks=2)
    with torch.no_grad():
        model.lm_head.weight[FIRST_SINK : FIRST_SINK + 2] *= 0
        model.lm_head.weight[FIRST_SINK : FIRST_SINK + 2] += model.lm_head.weight.abs().max() * 100
    logits = torch.randn(400, model.config.vocab_size)
    logits[:, FIRST_SINK : FIRST_SINK + 2] = 50.0
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}):
        for variant in (model, as_export(model)):
            chosen = generator(variant, **sampling).sample(logits)
            assert not ((chosen >= FIRST_SINK) & (chosen < FIRST_SINK + 2)).any()
    plain = generator(tiny_model(num_sinks=0)).sample(logits)
    assert ((plain >= FIRST_SINK) & (plain < FIRST_SINK + 2)).all()  # without sinks the ids are ordinary


def test_samples_follow_temperature_and_top_k():
    torch.manual_seed(0)
    model, logits = tiny_model(num_sinks=0), torch.tensor([3.0, 2.0, 1.0, 0.0, -30.0]).repeat(20_000, 1)
    for temperature, top_k, num_left in ((1.0, None, 5), (2.0, None, 5), (0.5, 2, 2), (1.0, 9, 5)):
        chosen = generator(model, temperature=temperature, top_k=top_k).sample(logits)
        expected = torch.zeros(5)
        expected[:num_left] = (logits[0, :num_left] / temperature).softmax(-1)
        shares = chosen.flatten().bincount(minlength=5) / len(chosen)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)
    assert (generator(model).sample(logits) == 0).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_a_temperature_near_0_chooses_the_most_likely_token(temperature):
    model, logits = tiny_model(num_sinks=0), torch.tensor([[-90.0, 89.9, 90.0]]).repeat(50, 1)
    for top_k in (None, 2):
        assert (generator(model, temperature=temperature, top_k=top_k).sample(logits) == 2).all()


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_a_very_high_temperature_chooses_at_random_among_the_allowed_tokens(temperature):
    model, logits = tiny_model(num_sinks=0), torch.tensor([[-90.0, -math.inf, 90.0]]).repeat(200, 1)
    assert generator(model, temperature=temperature).sample(logits).unique().tolist() == [0, 2]
    assert generator(model, temperature=temperature, top_k=1).sample(logits).unique().tolist() == [2]


@given(
    sampling=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.3, 1.0, 2.0]),
            "top_k": st.integers(1, 9),
            "top_p": st.floats(0.05, 1.0),
            "min_p": st.floats(0.0, 1.0),
            "repetition_penalty": st.floats(0.5, 2.0),
        },
    )
)
@settings(max_examples=25)
def test_the_loop_samples_as_generate_does(sampling):
    model, ids = MODEL, text(1, 6)
    sampling = {"temperature": 1.0} | sampling
    torch.manual_seed(0)
    arguments = Sampling(**sampling).generate_arguments()
    expected = model.generate(ids, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **arguments)
    torch.manual_seed(0)
    assert list(islice(generator(model, window=40, **sampling)(ids[0].tolist()), 8)) == expected[0, 6:].tolist()


def test_invalid_sampling_and_an_empty_prompt_are_an_error():
    model = tiny_model()
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature is"):
            generator(model, temperature=temperature)
    with pytest.raises(ValueError, match="top_k is 0: it must be at least 1"):
        generator(model, top_k=0)
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generator(model)([]))
    with pytest.raises(TypeError, match=r"cache is DynamicCache.*: pass StreamingCache\.for_model\("):
        Generator(model, DynamicCache())
    for prompt, name in (("a text", "str"), (["a"], "list"), (text(1, 5), "Tensor"), (text(1, 5).tolist(), "list")):
        with pytest.raises(TypeError, match=rf"of type {name}, not a list of token ids: pass tokenizer\("):
            next(generator(model)(prompt))


def test_the_next_prompt_ends_the_iterator_before():
    model, prompts = tiny_model(), (text(1, 5)[0].tolist(), text(1, 9)[0].tolist())
    one, other = generator(model), generator(model)
    older = one(prompts[0])
    expected = [next(other(prompts[0])), *islice(other(prompts[1]), 20)]
    written = [next(older)]
    newer = one(prompts[1])
    written.append(next(newer))
    with pytest.raises(ValueError, match="another prompt since"):
        next(older)
    assert written + list(islice(newer, 19)) == expected  # the error did not affect the newer text


def test_the_next_prompt_continues_the_whole_text():
    """The last token of the turn before is read first, which the iterator had not done."""
    first, second = (text(seed, seed)[0].tolist() for seed in (7, 4))
    turns = generator(MODEL)
    one, two = list(islice(turns(first), 6)), list(islice(turns(second), 6))
    assert list(islice(generator(MODEL)(first + one + second), 6)) == two
    turns.cache.reset()  # a new text, also without `turns.reset()`
    assert list(islice(turns(second), 6)) == list(islice(generator(MODEL)(second), 6))
    turns.reset()
    again = list(islice(turns(first), 6))
    turns.unread = []
    assert list(islice(turns(second), 6)) == list(islice(generator(MODEL)(first + again[:-1] + second), 6))


def test_the_default_cache_fits_the_model():
    assert default_cache(tiny_model(0, max_position_embeddings=2048)) == (4, 1020)
    assert default_cache(tiny_model(1, max_position_embeddings=2048)) == (1, 1023)
    assert default_cache(tiny_model(2, max_position_embeddings=2048)) == (2, 1022)
    assert default_cache(tiny_model(1, max_position_embeddings=128)) == (1, 126)
    assert default_cache(as_export(tiny_model(2, max_position_embeddings=2048))) == (2, 1022)


@pytest.mark.parametrize(
    ("layer_windows", "num_kept", "window_range", "default"),
    [
        ([7, 7], 2, None, (2, 7)),
        ([9, 9], 3, [2, 9], (3, 9)),
        ([7, None], 6, None, (6, 1018)),
        ([7, 3], 2, None, (2, 1022)),
    ],
)
def test_the_default_cache_of_an_export_is_that_of_its_former_windows(layer_windows, num_kept, window_range, default):
    model = as_export(tiny_model(2, max_position_embeddings=2048))
    recorded = {"layer_windows": layer_windows, "num_kept": num_kept, "window_range": window_range}
    model.config.trained_windows = recorded
    assert default_cache(model) == default
    with warnings.catch_warnings(action="error"):
        StreamingCache.for_model(model, num_kept=default[0], window=default[1])
    if default[1] < 100:
        name = f"{default[0]}\\+{default[1]}"
        assert decode_speed.default_caches(model) == [default]
        assert perplexity.default_caches(model)[2] == (2, sum(default) - 2)
        assert default in perplexity.default_caches(model)
        assert stream_qa.default_caches(model) == [(0, sum(default)), default]
        with pytest.warns(UserWarning, match=f"50 is too large for the windows {name}"):
            StreamingCache.for_model(model, num_kept=default[0], window=50)


@given(st.text(max_size=60))
def test_pieces_of_text_are_the_text(original):
    ids = TOKENIZER(original)["input_ids"]
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == TOKENIZER.decode(ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in original:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)  # no incomplete character was returned


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=200, max_size=400))
@settings(max_examples=30)
def test_text_is_decoded_with_a_bounded_number_of_tokens(ids):
    stream = TextStream(TOKENIZER)
    for token_id in ids:
        stream.push(token_id)
        assert len(stream.ids) <= 2 * MAX_PENDING


def test_a_character_appears_with_its_last_byte():
    ids = TOKENIZER("a€")["input_ids"]
    assert len(ids) == 4  # "a" and three bytes
    stream = TextStream(TOKENIZER)
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "€"]


def test_spaces_are_kept_if_the_tokenizer_drops_them_at_the_start_of_a_text():
    """As with the decoder of Llama's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"▁one": 0, "▁two": 1, "▁three": 2}
    raw = Tokenizer(models.WordLevel(words, unk_token="▁one"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert "".join(stream.push(i) for i in [0, 1, 2, 0]) == "one two three one"
