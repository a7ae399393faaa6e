"""`generate(past_key_values=cache)` writes the oracle's greedy tokens."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.streaming import StreamingCache, StreamingDecoder

from ..eval.checkpoints import small_model, write_checkpoint
from ..models.tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny

SETTINGS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}


def assert_greedy(model, text, num_new, num_kept, window, forbidden=()):
    """Check that the last ``num_new`` tokens of ``text`` ``(T,)`` are the most likely ones."""
    logits = oracle.stream_logits(model, text, num_kept, window)
    logits[:, list(forbidden)] = float("-inf")
    assert text[-num_new:].tolist() == logits[-num_new - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("family", ["gpt_neox", "llama:llama3", "falcon:40b", "mpt", "gptj"])
@pytest.mark.parametrize("prompt_length", [1, 6, 11, 25])
def test_greedy_text_is_the_oracles(family, prompt_length):
    model = tiny.build(tiny.config(family))
    cache = StreamingCache.for_model(model, num_kept=2, window=8)
    text = model.generate(tiny.random_ids(prompt_length), past_key_values=cache, max_new_tokens=20, **SETTINGS)
    assert_greedy(model, text[0], 20, 2, 8)


@pytest.mark.parametrize("prompt_length", [1, 25])
def test_greedy_text_of_a_model_with_sinks(prompt_length):
    model = tiny_model(num_sinks=2)
    cache = StreamingCache.for_model(model, num_kept=3, window=8)
    prompt = torch.randint(1, 300, (1, prompt_length))
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=15, **SETTINGS)
    with_sinks = torch.cat((sinks(model, 1), text), dim=1)[0]
    assert_greedy(plain_twin(model), with_sinks, 15, 3, 8, forbidden=model.config.sink_token_ids)


def test_a_chat_keeps_one_cache_through_its_turns():
    model = tiny.build(tiny.config("llama"))
    cache = StreamingCache.for_model(model, num_kept=2, window=8)
    conversation = tiny.random_ids(9)
    for turn in range(4):
        conversation = torch.cat((conversation, tiny.random_ids(3 + 6 * turn, seed=turn)), dim=1)
        conversation = model.generate(conversation, past_key_values=cache, max_new_tokens=6, **SETTINGS)
        assert_greedy(model, conversation[0], 6, 2, 8)
    assert cache.get_seq_length() == conversation.shape[1] - 1  # the last token has not been read yet


def test_a_text_ends_at_a_stop_string(tmp_path):
    """`generate` passes the tokenizer on to the attention function."""
    checkpoint = write_checkpoint(tmp_path, small_model(1))
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    prompt = tokenizer("import os", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    whole = model.generate(**prompt, **options)[0].tolist()
    stop = tokenizer.decode(whole[-6])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    cache = StreamingCache.for_model(model, num_kept=1, window=100)
    text = model.generate(**prompt, past_key_values=cache, **options)[0].tolist()
    assert text == model.generate(**prompt, **options)[0].tolist() == whole[: len(text)]
    assert len(text) < len(whole)


def test_threads_share_a_model():
    """Each has its own cache. The last one steps in the graph of a `StreamingDecoder`."""
    model = tiny.build(tiny.config("llama"))
    attention = model.config._attn_implementation
    prompts = [tiny.random_ids(5, seed=i) for i in range(3)]

    def write(i: int) -> list[int]:
        cache = StreamingCache.for_model(model, num_kept=2, window=8)
        if i < 2:
            options = SETTINGS | {"max_new_tokens": 20}
            return model.generate(prompts[i], past_key_values=cache, **options)[0].tolist()
        decoder = StreamingDecoder(model, cache, compile={"backend": "eager"})
        tokens = [decoder.prefill(prompts[i])[:, -1:].argmax(-1)]
        for _ in range(19):
            tokens.append(decoder(tokens[-1])[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1)[0].tolist()

    keeper = StreamingCache.for_model(model, num_kept=2, window=8)  # the first one, made before the threads
    alone = [write(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, range(3))) == alone
    del keeper
    assert model.config._attn_implementation == attention


def test_beams_find_the_same_text_as_without_eviction():
    """A cache that is never full gives the same beams as the default cache."""
    model = tiny.build(tiny.config("gpt_neox"))
    prompt, beams = tiny.random_ids(6), SETTINGS | {"num_beams": 3, "max_new_tokens": 20}
    roomy = StreamingCache.for_model(model, num_kept=2, window=50)
    assert model.generate(prompt, past_key_values=roomy, **beams).tolist() == model.generate(prompt, **beams).tolist()


def test_beams_of_a_full_cache_follow_their_rows():
    model = tiny.build(tiny.config("gpt_neox"))
    prompt = tiny.random_ids(12)
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    settings = SETTINGS | {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    result = model.generate(prompt, past_key_values=cache, max_new_tokens=10, length_penalty=0.0, **settings)
    text = result.sequences[0]
    log_probs = oracle.stream_logits(model, text, 2, 6).log_softmax(-1)
    by_oracle = sum(log_probs[t - 1, text[t]] for t in range(12, 22))
    torch.testing.assert_close(result.sequences_scores[0].double(), by_oracle, rtol=0, atol=1e-4)


def test_left_padded_prompts_continue_as_they_would_alone():
    model = tiny.build(tiny.config("llama"))
    lengths = [23, 9, 4, 1]
    prompts = [tiny.random_ids(n, seed=n)[0] for n in lengths]
    ids = torch.stack([torch.nn.functional.pad(p, (23 - len(p), 0)) for p in prompts])
    mask = torch.tensor([[0] * (23 - n) + [1] * n for n in lengths])
    cache = StreamingCache.for_model(model, num_kept=2, window=8)
    text = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=15, **SETTINGS)
    for row, n in zip(text, lengths, strict=True):
        assert_greedy(model, row[23 - n :], 15, 2, 8)
