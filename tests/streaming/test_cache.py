"""The interface of the cache: errors, cleanup, reset and crop."""

import copy
import gc
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import ModelOutput

from sinklm.models.cache_argument import CACHE
from sinklm.streaming import Rotary, StreamingCache, default_cache, stream_logits
from sinklm.streaming.steering import join_outputs
from sinklm.streaming.testing import random_model

from ..models.tiny import tiny_model
from . import small_families, tiny


@pytest.fixture
def model():
    return tiny.build(tiny.config("gpt_neox"))


def for_model(model, **settings):
    return StreamingCache.for_model(model, **{"num_kept": 2, "window": 6} | settings)


@torch.no_grad()
def run(model, ids, cache, **kwargs):
    return model(ids, past_key_values=cache, **kwargs).logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": -3}, "window is -3"),
        ({"num_kept": -1}, "num_kept is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"window": 9.0}, "window is 9.0: it must be a whole number of at least 1"),
        ({"window": "9"}, "window is '9': it must be a whole number of at least 1"),
        ({"num_kept": True}, "num_kept is True: it must be a whole number of at least 0"),
        ({"chunk_size": 2.5}, "chunk_size is 2.5: it must be a whole number of at least 1"),
    ],
)
def test_invalid_sizes_are_an_error(model, settings, message):
    with pytest.raises(ValueError, match=message):
        for_model(model, **settings)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt2", "absolute position embeddings"),
        ("opt", "absolute position embeddings"),
        ("mamba", "no keys to keep"),
    ],
)
def test_models_whose_positions_cannot_be_moved_are_an_error(model_type, message):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    if model_type == "opt":
        small |= {"ffn_dim": 16, "word_embed_proj_dim": 16}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small))
    with pytest.raises(ValueError, match=f"'{model_type}'.*{message}"):
        for_model(other)


def test_an_unknown_kind_of_rotary_embedding_is_an_error():
    other = tiny.build(tiny.config("llama"))
    other.model.rotary_emb.rope_type = "new"
    with pytest.raises(ValueError, match="rope_type 'new'"):
        for_model(other)


def test_a_bloom_whose_own_code_leaves_out_a_bias_is_an_error():
    sliced = small_families.config("bloom")
    sliced.pretraining_tp = 2
    assert "window=6" in repr(for_model(tiny.build(sliced)))
    sliced.slow_but_exact = True
    with pytest.raises(ValueError, match="load the model with slow_but_exact=False"):
        for_model(tiny.build(sliced))


def test_a_cache_says_that_layers_keep_the_models_own_window():
    other = tiny.build(tiny.config("mistral:sliding"))
    assert repr(for_model(other, num_kept=4, window=9)) == "StreamingCache(num_kept=4, window=9, seen=0)"
    for window, own in ((10, "0+10"), (12, "0+12"), (40, "0+13")):
        assert f"window={window}, 2 of 2 layers {own}, seen=0" in repr(for_model(other, num_kept=4, window=window))


def test_a_kv_dtype_that_quantizes_nothing_is_an_error():
    model = tiny.build(tiny.config("llama"))
    with pytest.raises(ValueError, match=r"kv_dtype='int8' would quantize nothing: .* of more than 32 tokens"):
        for_model(model, window=32, kv_dtype="int8")
    assert "window=33, kv_dtype='int4', seen=0" in repr(for_model(model, window=33, kv_dtype="int4"))


def test_more_positions_than_the_model_was_trained_on_give_a_warning():
    other = tiny.build(tiny.config("llama", max_position_embeddings=16))
    with pytest.warns(UserWarning, match="the cache 4\\+12 is too large for the 16 positions"):
        for_model(other, num_kept=4, window=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for_model(other, num_kept=4, window=11)


WRONG_ROWS = [[True, False], torch.tensor([True, False]), [0.7], torch.tensor([0.0]), [5], [-1], "0", {0}, 0, [[0]]]


@pytest.mark.parametrize("rows", WRONG_ROWS, ids=str)
def test_rows_to_reset_that_are_not_row_numbers_are_an_error(rows):
    model = tiny.build(tiny.config("llama"))
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    with torch.no_grad():
        model(tiny.random_ids(3, batch_size=2), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"^rows is .*: pass .* row numbers from 0 to 1$"):
        cache.reset(rows)
    for right in ([], (1,), range(1, 2), torch.tensor([1]), torch.tensor([1]).numpy()):
        cache.reset(right)
        assert cache.streams.counters.num_seen.tolist() == [3, 0 if len(right) else 3]


def test_resetting_rows_starts_new_streams_in_them(model):
    cache, ids = for_model(model), tiny.random_ids(30, batch_size=3)
    run(model, ids, cache)
    cache.reset([0, 2])
    more = tiny.random_ids(25, batch_size=3, seed=4)
    found = torch.cat([run(model, part, cache) for part in (more[:, :1], more[:, 1:9], more[:, 9:])], dim=1)
    for row, before in enumerate((0, 30, 0)):
        text = torch.cat((ids[row, :before], more[row]))[None]
        torch.testing.assert_close(found[row], run(model, text, for_model(model))[0, before:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_rows_of_a_model_with_sinks_start_again_after_the_sinks(kv_dtype):
    model, window = tiny_model(num_sinks=2), 33 if kv_dtype else 6
    cache = for_model(model, num_kept=3, window=window, kv_dtype=kv_dtype)
    ids, more = tiny.random_ids(30, batch_size=2), tiny.random_ids(9, batch_size=2, seed=4)
    run(model, ids, cache)
    run(model, ids[:, :1], cache)
    cache.reset([1])
    expected = run(model, more[1:], for_model(model, num_kept=3, window=window, kv_dtype=kv_dtype))
    torch.testing.assert_close(run(model, more, cache)[1:], expected, rtol=0, atol=1e-5)
    evicting = for_model(model, num_kept=1)
    run(model, ids, evicting)
    with pytest.raises(ValueError, match="2 sink tokens, of which the cache keeps 1"):
        evicting.reset([0])


def test_a_model_can_be_saved_whole_while_it_streams(model, tmp_path):
    ids = tiny.random_ids(9)
    cache = for_model(model)
    run(model, ids, cache)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(run(loaded, ids, for_model(loaded)), run(model, ids, for_model(model)))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "falcon", "mpt", "gptj"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_cache_of_another_model_is_an_error(model, family, num_tokens):
    cache = for_model(model)
    run(model, tiny.random_ids(4), cache)
    other = tiny.build(tiny.config(family))
    for stranger in (other, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="made for another model"):
            run(stranger, tiny.random_ids(num_tokens), cache)


def test_right_padding_and_other_masks_are_an_error(model):
    ids = tiny.random_ids(4, batch_size=2)
    with pytest.raises(ValueError, match="row 1 of the batch has padding on the right: pad on the left"):
        run(model, ids, for_model(model), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        run(model, ids, for_model(model), attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        run(model, ids, for_model(model), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_model_in_another_data_type_is_an_error_with_a_used_cache(model, kv_dtype):
    model = copy.deepcopy(model).float()
    cache = StreamingCache.for_model(model, num_kept=1, window=64, kv_dtype=kv_dtype)
    run(model, tiny.random_ids(4), cache)
    model.to(torch.bfloat16)
    for num_tokens in (1, 3):
        with pytest.raises(ValueError, match=r"has states in torch\.float32, and the model now computes in torch\.bf"):
            run(model, tiny.random_ids(num_tokens), cache)
    cache.reset()
    run(model, tiny.random_ids(3), cache)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "the input is empty: pass at least one token"),
        (torch.zeros(0, 3, dtype=torch.long), "the input is empty: pass at least one token"),
        (torch.zeros(3, dtype=torch.long), r"the inputs have shape \(3,\): pass ids of shape \(batch, tokens\)"),
    ],
)
def test_inputs_that_are_no_text_are_an_error(model, ids, message):
    with pytest.raises(ValueError, match=message):
        run(model, ids, for_model(model))


def test_generating_without_use_cache_is_an_error():
    """It is MPT's default, and `generate` would pass the whole text again at each step."""
    other = tiny.build(tiny.config("mpt"))
    with pytest.raises(ValueError, match="pass use_cache=True"):
        other.generate(tiny.random_ids(3), past_key_values=for_model(other), max_new_tokens=3)


def test_another_batch_size_is_an_error_until_reset(model):
    cache = for_model(model)
    run(model, tiny.random_ids(4, batch_size=2), cache)
    with pytest.raises(ValueError, match=r"has 2 streams, but the batch has 3 rows: call reset\(\) for new texts, or"):
        run(model, tiny.random_ids(1, batch_size=3), cache)
    with pytest.raises(ValueError, match=r"call batch_repeat_interleave\(2\) to continue each stream in 2 rows, reset"):
        run(model, tiny.random_ids(1, batch_size=4), cache)
    cache.reset()
    run(model, tiny.random_ids(1, batch_size=3), cache)
    assert cache.batch_size == 3


def test_reset_begins_a_new_stream(model):
    cache, ids = for_model(model), tiny.random_ids(30)
    first = run(model, ids, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, ids, cache), first, rtol=0, atol=1e-12)


def test_crop_removes_tokens_until_one_has_left_the_cache(model):
    cache, ids = for_model(model), tiny.random_ids(9)
    with pytest.raises(ValueError, match="has read no token"):
        cache.crop(-1)
    expected = run(model, ids, for_model(model))
    run(model, ids[:, :5], cache)
    run(model, tiny.random_ids(4, seed=9), cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(run(model, ids[:, 5:], cache), expected[:, 5:], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="only 9 tokens"):
        cache.crop(-10)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    run(model, ids[:, :1], cache)
    with pytest.raises(ValueError, match="have left the cache"):
        cache.crop(-1)


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("num_tokens", [8, 9])
def test_crop_after_a_failed_token(model, monkeypatch, tmp_path, num_tokens, is_saved):
    """The token is in a slot of its own, or in that of a token that `crop` would bring back."""
    ids, cache = tiny.random_ids(num_tokens + 3), for_model(model)
    run(model, ids[:, :num_tokens], cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.gpt_neox.layers[-1]), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids[:, num_tokens : num_tokens + 1], cache)
    if is_saved:
        cache.save(tmp_path / "cache")
        cache = StreamingCache.load(tmp_path / "cache", model)
    if num_tokens == 9:  # as many as the cache has slots
        assert not cache.is_croppable
        with pytest.raises(ValueError, match="have left the cache"):
            cache.crop(-4)
    else:
        cache.crop(-4)
    rest = ids[:, cache.get_seq_length() :]
    expected = run(model, ids, for_model(model))[:, -rest.shape[1] :]
    torch.testing.assert_close(run(model, rest, cache), expected, rtol=0, atol=1e-5)


def test_a_repeated_token_ends_a_failure(model, monkeypatch):
    ids, cache = tiny.random_ids(9), for_model(model)
    run(model, ids[:, :8], cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.gpt_neox.layers[-1]), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids[:, 8:], cache)
    run(model, ids[:, 8:], cache)
    assert cache.is_croppable
    cache.crop(-1)
    torch.testing.assert_close(run(model, ids[:, 8:], cache), run(model, ids, for_model(model))[:, 8:])


def test_crop_is_an_error_after_padding(model):
    """Of the last two inputs, one row would lose two tokens and the other only one."""
    cache, ids = for_model(model), tiny.random_ids(5, batch_size=2)
    run(model, ids[:, :3], cache)
    run(model, ids[:, 3:], cache, attention_mask=torch.tensor([[1, 1], [0, 1]]))
    with pytest.raises(ValueError, match="that had padding"):
        cache.crop(-2)


def test_the_error_of_crop_names_the_features_that_need_it(model):
    ids, settings = tiny.random_ids(4).repeat(1, 5), {"max_new_tokens": 6, "use_cache": True, "do_sample": False}
    transformers_own = "Assisted decoding requires a cache that can be cropped"  # from 5.24 on
    with pytest.raises(ValueError, match=f"prompt lookup remove tokens|{transformers_own}"):
        model.generate(ids, past_key_values=for_model(model), prompt_lookup_num_tokens=3, **settings)


@pytest.mark.parametrize("build", [lambda: tiny.build(tiny.config("llama")), lambda: tiny_model(num_sinks=1)])
def test_generating_from_only_the_new_turn_is_an_error(build):
    model, settings = build(), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "use_cache": True}
    cache = for_model(model)
    text = model.generate(tiny.random_ids(9), past_key_values=cache, **settings)
    turn = tiny.random_ids(4, seed=5)
    with pytest.raises(ValueError, match="the full sequence, that is the tokens that are already in the cache"):
        model.generate(turn, past_key_values=cache, **settings)
    cache.reset()
    text = model.generate(tiny.random_ids(9), past_key_values=cache, **settings)
    model.generate(torch.cat((text, turn), dim=1), past_key_values=cache, **settings)


def test_a_row_may_have_no_token_in_a_turn(model):
    cache, ids, more = for_model(model), tiny.random_ids(5, batch_size=2), tiny.random_ids(3, batch_size=2, seed=4)
    run(model, ids, cache)
    run(model, more, cache, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    last = run(model, more, cache)
    for row, text in enumerate((torch.cat((ids, more, more), dim=1)[0], torch.cat((ids, more), dim=1)[1])):
        expected = run(model, text[None], for_model(model))[0, -3:]
        torch.testing.assert_close(last[row], expected, rtol=0, atol=1e-5)


def test_attention_weights_and_saving_are_an_error(model, tmp_path):
    cache = for_model(model)
    with pytest.raises(ValueError, match="output_attentions"):
        run(model, tiny.random_ids(4), cache, output_attentions=True)
    with pytest.raises(ValueError, match="neither pickled nor copied"):
        torch.save(cache, tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="neither pickled nor copied"):
        copy.copy(cache)


def test_a_backward_pass_is_an_error(model):
    ids = tiny.random_ids(6)
    loss = model(ids, labels=ids, past_key_values=for_model(model)).loss
    with pytest.raises(ValueError, match="no gradients"):
        loss.backward()


def test_leaving_no_stream_is_an_error(model):
    cache = for_model(model)
    run(model, tiny.random_ids(4), cache)
    for leave_none in (
        lambda: cache.batch_repeat_interleave(0),
        lambda: cache.batch_select_indices(torch.tensor([], dtype=torch.long)),
    ):
        with pytest.raises(ValueError, match=r"no stream would be left: keep at least one row, or call reset\(\)"):
            leave_none()
    run(model, tiny.random_ids(4), cache)


def test_repeating_an_empty_cache_does_nothing(model):
    cache = for_model(model)
    cache.batch_repeat_interleave(3)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "mpt", "gptj"])
def test_the_model_is_unchanged(family):
    """A cache does not affect other calls, and no hooks remain when it is deleted."""
    model = tiny.build(tiny.config(family))
    ids = tiny.random_ids(12)
    before = run(model, ids, None)
    implementation = model.config._attn_implementation
    cache = for_model(model)
    run(model, ids, cache)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(run(model, ids, None), before, rtol=0, atol=1e-12)
    torch.testing.assert_close(run(model, ids, DynamicCache(config=model.config)), before, rtol=0, atol=1e-12)
    del cache
    gc.collect()
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_continues_independently(model):
    """A prompt is read once and continued twice; the model is not copied."""
    cache, prompt, ids = for_model(model), tiny.random_ids(17), tiny.random_ids(9, seed=3)
    run(model, prompt, cache)
    twin = copy.deepcopy(cache)
    assert twin.decoder is cache.decoder
    run(model, tiny.random_ids(5, seed=4), cache)
    fresh = for_model(model)
    run(model, prompt, fresh)
    torch.testing.assert_close(run(model, ids, twin), run(model, ids, fresh), rtol=0, atol=1e-9)


def test_two_caches_of_one_model_do_not_mix(model):
    ids, others = tiny.random_ids(24), tiny.random_ids(24, seed=5)
    alone = run(model, ids, for_model(model))
    one, two = for_model(model), for_model(model, num_kept=0, window=3)
    pieces = []
    for piece, other in zip(ids.split(5, dim=1), others.split(5, dim=1), strict=True):
        pieces.append(run(model, piece, one))
        run(model, other, two)
    torch.testing.assert_close(torch.cat(pieces, dim=1), alone, rtol=0, atol=1e-5)


def test_a_pass_that_fails_midway_leaves_the_model_intact_and_the_cache_marked(model):
    cache, ids = for_model(model, chunk_size=8), tiny.random_ids(20)
    implementation = model.config._attn_implementation
    handle = model.base_model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        run(model, ids, cache)
    handle.remove()
    assert model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="call reset"):
        run(model, ids, cache)
    cache.reset()
    torch.testing.assert_close(run(model, ids, cache), run(model, ids, for_model(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 5, 30])
def test_ctrl_c_during_a_pass_leaves_the_model_intact(model, monkeypatch, num_tokens):
    ids = tiny.random_ids(45)
    expected, stream = model(ids).logits, run(model, ids, for_model(model))
    cache = for_model(model, chunk_size=8)
    run(model, ids[:, :5], cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.gpt_neox.layers[-1]), "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids[:, 5 : 5 + num_tokens], cache)
    torch.testing.assert_close(model(ids).logits, expected)
    if num_tokens > 1:
        with pytest.raises(ValueError, match="failed midway"):
            run(model, ids[:, 5:], cache)
        cache.reset()
        run(model, ids[:, :5], cache)
    torch.testing.assert_close(run(model, ids[:, 5:], cache), stream[:, 5:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "gptj"])
def test_ctrl_c_and_deleting_the_cache_leave_the_model_intact(family, monkeypatch):
    model, ids = tiny.build(tiny.config(family)), tiny.random_ids(9)
    expected, cache = model(ids).logits, for_model(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.get_decoder()).__mro__[0], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids, cache)
    del cache
    gc.collect()
    torch.testing.assert_close(model(ids).logits, expected)
    run(model, ids, for_model(model))
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["gpt_neox", "mpt"])
@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_in_one_cache_does_not_affect_another(family, interrupted, monkeypatch):
    model, ids = tiny.build(tiny.config(family)), tiny.random_ids(20)
    expected, stream = model(ids).logits, run(model, ids, for_model(model), use_cache=True)
    caches = [for_model(model), for_model(model)]
    with monkeypatch.context() as patch:
        patch.setattr(type(model.get_decoder()).__mro__[0], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids, caches[interrupted], use_cache=True)
    other = caches[1 - interrupted]
    torch.testing.assert_close(run(model, ids, other, use_cache=True), stream, rtol=0, atol=5e-5)
    torch.testing.assert_close(model(ids).logits, expected)
    assert caches[interrupted].is_damaged


@pytest.mark.parametrize("family", ["gpt_neox", "mpt"])
def test_a_model_copied_after_ctrl_c_is_intact(family, monkeypatch):
    model, ids = tiny.build(tiny.config(family)), tiny.random_ids(9)
    expected, cache = model(ids).logits, for_model(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.get_decoder()).__mro__[0], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids, cache, use_cache=True)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, expected)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_prompt_that_fails_in_any_of_its_chunks_damages_the_cache(model, piece, error):
    """17 tokens are two chunks and a single token, whose failure alone would do no damage."""
    cache, pieces = for_model(model, chunk_size=8), iter(range(3))

    def fail_in_piece(*args):
        if next(pieces) == piece:
            raise error

    model.base_model.layers[1].register_forward_pre_hook(fail_in_piece)
    with pytest.raises(error):
        run(model, tiny.random_ids(17), cache)
    assert cache.is_damaged
    with pytest.raises(ValueError, match="failed midway"):
        run(model, tiny.random_ids(1), cache)


def test_a_copy_of_a_damaged_cache_is_damaged(model, monkeypatch):
    ids, cache = tiny.random_ids(9), for_model(model)
    monkeypatch.setattr(type(model.gpt_neox.layers[-1]), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, cache)
    assert copy.deepcopy(cache).is_damaged


def test_ctrl_c_while_phases_are_moved_damages_the_cache(model, monkeypatch):
    ids, cache = tiny.random_ids(30), for_model(model)
    run(model, ids[:, :20], cache)
    monkeypatch.setattr(Rotary, "turn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids[:, 20:], cache)
    assert cache.is_damaged


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_memory_is_allocated_once_and_written_in_place(model):
    cache = for_model(model)
    run(model, tiny.random_ids(3), cache)
    layer, counters = cache.streams.layers[0], cache.streams.counters
    addresses = [buffer.data_ptr() for buffer in (layer.keys, layer.values, layer.kept_keys, counters.num_seen)]
    for num_tokens in (1, 40, 1, 1, 7):
        run(model, tiny.random_ids(num_tokens), cache)
    assert layer.keys.shape == (1, 4, 9, 12)
    assert counters is cache.streams.counters
    assert addresses == [b.data_ptr() for b in (layer.keys, layer.values, layer.kept_keys, counters.num_seen)]


def test_inference_mode_and_gradients_may_alternate(model):
    cache, ids = for_model(model), tiny.random_ids(20)
    expected = run(model, ids, for_model(model))
    with torch.inference_mode():
        pieces = [model(ids[:, :9], past_key_values=cache).logits]
    pieces += [model(ids[:, 9:15], past_key_values=cache).logits, model(ids[:, 15:], past_key_values=cache).logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["repeat", "copy"])
def test_buffers_made_in_inference_mode_can_be_used_outside_of_it(model, change):
    cache, ids = for_model(model), tiny.random_ids(5)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        if change == "repeat":
            cache.batch_repeat_interleave(2)
        else:
            cache = copy.deepcopy(cache)
    assert not any(buffer.is_inference() for buffer in vars(cache.streams.counters).values())
    model(ids[:, :1].expand(cache.batch_size, -1), past_key_values=cache)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "gemma3n_text"])
@torch.no_grad()
def test_all_outputs_of_a_prompt_in_chunks_are_whole(family, return_dict):
    """Those of routers have no dimension for rows, and states of Gemma 3n have one more."""
    model, ids = random_model(small_families.config(family)), tiny.random_ids(20, batch_size=2)
    options = {"output_hidden_states": True, "return_dict": return_dict}
    if family == "mixtral":
        options["output_router_logits"] = True
    for part in (model.get_decoder(), model):
        whole, parts = (part(ids, **{CACHE: for_model(model, chunk_size=size)}, **options) for size in (20, 5))
        whole, parts = (tuple(output.values()) if return_dict else output for output in (whole, parts))
        for a, b in zip(flattened(whole), flattened(parts), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def flattened(output):
    """Return all tensors of an output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for value in output for tensor in flattened(value)] if isinstance(output, tuple) else []


def test_values_without_a_dimension_of_tokens_are_those_of_the_last_chunk():
    chunks = [
        ModelOutput(last_hidden_state=torch.full((2, 3, 4), i), loss=torch.tensor(i), counts=torch.full((4,), i))
        for i in (1, 2)
    ]
    joined = join_outputs(chunks, batch_size=2)
    assert joined.last_hidden_state.shape == (2, 6, 4)
    assert (joined.loss, joined.counts.tolist()) == (2, [2, 2, 2, 2])


def test_torch_compiles_the_code_of_layers_once(model):
    """After eight times for one code, torch would run it without compiling it."""
    cache, counter, states = for_model(model), CompileCounter(), torch.ones(1, 4, 1, 8)
    cache.begin_pass(tiny.random_ids(1), None)

    class Layer(torch.nn.Module):
        def __init__(self, layer_idx):
            super().__init__()
            self.layer_idx = layer_idx

        def forward(self, states):
            return cache.update(states, states, self.layer_idx)[0] + 1

    for index in range(3):
        layer = Layer(index)
        layer.compile(backend=counter)
        layer(states)
        assert cache.step.is_waiting
        cache.step.is_waiting = False
    assert counter.frame_count == 1


def test_the_decoder_can_be_called_by_position(model):
    ids = tiny.random_ids(12)
    mask = torch.ones_like(ids)
    cache = for_model(model)
    with torch.no_grad():
        by_position = model.base_model(ids, mask, None, None, cache).last_hidden_state
        by_name = model.base_model(ids, past_key_values=for_model(model)).last_hidden_state
    torch.testing.assert_close(by_position, by_name, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_cache_may_be_garbage_collected_while_torch_calls_hooks(hook):
    model, ids = tiny.build(tiny.config("gpt_neox")), tiny.random_ids(8)
    expected, caches = model(ids).logits, []

    def collect(*_):
        caches.clear()
        gc.collect()

    getattr(model.base_model, hook)(collect)
    caches.append(StreamingCache.for_model(model, num_kept=1, window=4))
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)
    assert len(model.base_model._forward_pre_hooks) == (hook == "register_forward_pre_hook")
    assert "forward" not in vars(model.base_model)


def test_wrong_ways_to_create_a_cache_name_the_right_one():
    for arguments, options in (((), {}), ((tiny.build(tiny.config("llama")),), {"num_kept": 4, "window": 9})):
        with pytest.raises(TypeError, match=r"not created by its constructor: use StreamingCache\.for_model\(model, "):
            StreamingCache(*arguments, **options)
    ways = (
        lambda: StreamingCache.for_model("a/b", num_kept=4, window=9),
        lambda: StreamingCache.load("file", "a/b"),
        lambda: next(stream_logits("a/b", tiny.random_ids(3), num_kept=4, window=9)),
        lambda: default_cache("a/b"),
    )
    for use in ways:
        with pytest.raises(
            TypeError, match=r"a loaded model is needed and not its name: pass sinklm\.load_model\('a/b'"
        ):
            use()
