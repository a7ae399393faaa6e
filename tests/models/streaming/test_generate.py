"""`generate(past_key_values=cache)`: greedy text equals the oracle's, for stock models and for ours."""

import pytest
import torch
from sinklm.models.streaming import StreamingCache

from ..tiny import plain_twin, sinks, tiny_model
from . import oracle, tiny

SETTINGS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def greedy(model, prompt, num_new, num_kept, window, forbidden=()):
    """Continue ``(T,)`` by the oracle's most probable tokens."""
    ids = prompt
    for _ in range(num_new):
        last = oracle.stream_logits(model, ids, num_kept, window)[-1]
        last[list(forbidden)] = float("-inf")
        ids = torch.cat((ids, last.argmax().view(1)))
    return ids


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("prompt_length", [1, 6, 11, 25])
def test_greedy_text_is_the_oracles(family, prompt_length):
    model = tiny.build(tiny.config(family, num_hidden_layers=2))
    prompt = tiny.random_ids(prompt_length)
    cache = StreamingCache.for_model(model, num_kept=2, window=8)
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=20, **SETTINGS)
    assert text[0].tolist() == greedy(model, prompt[0], 20, 2, 8).tolist()


@pytest.mark.parametrize("prompt_length", [1, 25])
def test_greedy_text_of_a_model_with_sinks(prompt_length):
    model = tiny_model(num_sinks=2)
    prompt = torch.randint(1, 300, (1, prompt_length))
    cache = StreamingCache.for_model(model, num_kept=3, window=8)
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=15, **SETTINGS)
    with_sinks = torch.cat((sinks(model, 1), prompt), dim=1)[0]
    expected = greedy(plain_twin(model), with_sinks, 15, 3, 8, forbidden=model.config.sink_token_ids)
    assert text[0].tolist() == expected[2:].tolist()


def test_a_second_turn_goes_on_in_the_same_cache():
    model = tiny.build(tiny.config("llama", num_hidden_layers=2))
    cache = StreamingCache.for_model(model, num_kept=2, window=8)
    first = model.generate(tiny.random_ids(9), past_key_values=cache, max_new_tokens=6, **SETTINGS)
    conversation = torch.cat((first, tiny.random_ids(14, seed=2)), dim=1)
    second = model.generate(conversation, past_key_values=cache, max_new_tokens=6, **SETTINGS)
    assert second[0].tolist() == greedy(model, conversation[0], 6, 2, 8).tolist()
