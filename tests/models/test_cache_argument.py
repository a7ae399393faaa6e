"""A model with sinks accepts a cache under both argument names, and under no other name."""

import pytest
import torch
from transformers import Cache, DynamicCache

from sinklm.models.cache_argument import CACHE, NAMES
from sinklm.streaming import StreamingCache

from ..streaming import tiny
from .tiny import text, tiny_model

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "streaming": lambda model: StreamingCache.for_model(model, num_kept=1, window=20),
}


def stepped(model, ids, name: str, cache: Cache):
    """Logits of a prompt and of two more tokens, with the cache passed under ``name``."""
    return torch.cat([model(piece, **{name: cache}).logits for piece in ids.split([5, 1, 1], dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("num_sinks", [0, 1, 2])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_both_names_continue_the_same_text(name, kind, num_sinks):
    model, ids = tiny_model(num_sinks), text(1, 7)
    torch.testing.assert_close(stepped(model, ids, name, CACHES[kind](model)), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_hook_finds_the_cache_of_a_stock_model_under_any_name(name):
    model, ids = tiny.build(tiny.config("llama"), dtype=torch.float32), tiny.random_ids(7)
    if name not in NAMES[: 1 + (CACHE == "cache")] and name != CACHE:  # 5.24 still accepts the old name
        pytest.skip("the installed transformers does not have this argument")
    cache = StreamingCache.for_model(model, num_kept=1, window=20)
    torch.testing.assert_close(stepped(model, ids, name, cache), model(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_cache_under_an_unknown_name_is_an_error():
    model, ids = tiny_model(1), text(1, 7)
    with pytest.raises(ValueError, match="as the unknown argument kv_cache: pass it as cache or past_key_values"):
        model(ids, kv_cache=DynamicCache())


def test_two_caches_are_an_error():
    model, ids = tiny_model(1), text(1, 7)
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    one = DynamicCache()
    model(ids, cache=one, past_key_values=one)
