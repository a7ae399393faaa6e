"""Models inside of wrappers stream like the model itself, or are refused by name."""

import pytest
import torch

from sinklm.models.cache_argument import CACHE
from sinklm.streaming import Generator, StreamingCache, default_cache, stream_losses

from . import tiny


@pytest.fixture
def model():
    return tiny.build(tiny.config("llama"), dtype=torch.float32)


@torch.no_grad()
def logits(model, ids, sizes):
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    return torch.cat([model(input_ids=piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()


class Engine(torch.nn.Module):
    """A wrapper that has the model as ``module``, like those of DDP, FSDP and DeepSpeed."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, Engine, lora, lambda model: Engine(lora(model))])
def test_a_wrapped_model_streams(wrap, model):
    wrapped, ids = wrap(model), tiny.random_ids(20)
    cached = logits(wrapped, ids, [3, 1, 9, 1, 6])
    torch.testing.assert_close(cached, logits(wrapped, ids, [20]), rtol=0, atol=1e-4)
    torch.testing.assert_close(cached, logits(model, ids, [20]), rtol=0, atol=1e-4)
    assert default_cache(wrapped) == default_cache(model)
    losses = [torch.cat(list(stream_losses(m, ids, num_kept=2, window=6)), dim=1) for m in (wrapped, model)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
    texts = [Generator(m, StreamingCache.for_model(m, num_kept=2, window=6))([1, 2, 3]) for m in (wrapped, model)]
    assert [next(texts[0]) for _ in range(5)] == [next(texts[1]) for _ in range(5)]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
    ],
)
def test_virtual_tokens_are_an_error(method, settings, model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **settings))
    for wrapper in (wrapped, Engine(wrapped)):
        with pytest.raises(ValueError, match=r"does not support (PREFIX_TUNING|PROMPT_TUNING|ADAPTION_PROMPT) of PEFT"):
            StreamingCache.for_model(wrapper, num_kept=2, window=6)
    if method == "AdaptionPromptConfig":
        return
    cache = StreamingCache.for_model(model, num_kept=2, window=6)  # of the model inside, whose prompt would be lost
    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match=r"does not support (PREFIX_TUNING|PROMPT_TUNING) of PEFT"):
            wrapped.generate(input_ids=tiny.random_ids(5), **{CACHE: cache}, max_new_tokens=2, **options)
    with wrapped.disable_adapter():
        wrapped.generate(input_ids=tiny.random_ids(5), **{CACHE: cache}, max_new_tokens=2)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("LilyConfig", {}), ("ShadowConfig", {}), ("LoraConfig", {"alora_invocation_tokens": [5, 6]})],
)
def test_adapters_that_depend_on_the_passes_are_an_error(method, settings, model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **settings))
    for each in (wrapped, Engine(wrapped), wrapped.get_base_model()):
        with pytest.raises(
            ValueError, match=r"does not support (LILY|SHADOW|LORA with alora_invocation_tokens) of PEFT"
        ):
            StreamingCache.for_model(each, num_kept=2, window=6)


def test_replicas_are_an_error(model):
    wrapped = torch.nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel on several devices.*pass its .module"):
        StreamingCache.for_model(wrapped, num_kept=2, window=6)


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), None])
def test_something_else_is_an_error(other):
    with pytest.raises(ValueError, match="is not a model of transformers"):
        StreamingCache.for_model(other, num_kept=2, window=6)
