"""Text in a model of text and images, which computes its own masks."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma3Config

from sinklm.models.cache_argument import CACHE
from sinklm.streaming import StreamingCache, steering
from sinklm.streaming.masks import check_padding, text_mask, which_are_tokens
from sinklm.streaming.testing import random_model, reference_logits

from . import small_families, tiny
from .test_batches import pad_left

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def models():
    """Gemma 3 of text and images, and its text model with the same weights."""
    text = small_families.config("gemma3_text")
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=100,
        boi_token_id=98,
        eoi_token_id=99,
    )
    model, alone = AutoModelForCausalLM.from_config(config).eval(), random_model(text)
    model.get_decoder().load_state_dict(alone.model.state_dict())
    model.lm_head.load_state_dict(alone.lm_head.state_dict())
    return model, alone


@pytest.mark.parametrize(("family", "argument"), [("gemma3n_text", "per_layer_inputs"), ("gptj", "token_type_ids")])
@torch.no_grad()
def test_arguments_with_a_value_for_each_token_are_cut_into_chunks(family, argument):
    """Gemma 3n with images gets the first one from the model around it."""
    model, ids = random_model(small_families.config(family)), tiny.random_ids(20)
    decoder, inputs = model.get_decoder(), {"inputs_embeds": model.get_input_embeddings()(ids)}
    inputs[argument] = decoder.get_per_layer_inputs(ids) if argument == "per_layer_inputs" else ids.flip(1)
    whole, parts = (
        decoder(
            **inputs, use_cache=True, **{CACHE: StreamingCache.for_model(model, num_kept=1, window=5, chunk_size=n)}
        )
        for n in (20, 6)
    )
    torch.testing.assert_close(parts.last_hidden_state, whole.last_hidden_state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_of_text_stream_as_in_the_text_model(models, implementation, monkeypatch):
    """Masks have the new inputs only: they do not grow with the stream."""
    model, alone = models
    model.set_attn_implementation(implementation)

    def checked(masks, num_inputs):
        assert {mask.shape[2:] for mask in masks.values() if mask is not None} <= {(num_inputs, num_inputs)}
        return text_mask(masks, num_inputs)

    monkeypatch.setattr(steering, "text_mask", checked)
    streams = [tiny.random_ids(n, seed=n)[0] % 98 for n in (20, 13, 5)]
    (ids, mask), cache = pad_left(streams), StreamingCache.for_model(model, num_kept=1, window=5)
    passes, logits = ids.split([9, 1, 1, 9], dim=1), []
    for end, piece in zip((9, 10, 11, 20), passes, strict=True):
        logits.append(model(piece, attention_mask=mask[:, :end], use_cache=True, **{CACHE: cache}).logits)
    for row, stream in zip(torch.cat(logits, dim=1), streams, strict=True):
        expected = reference_logits(alone, stream, 1, 5)
        torch.testing.assert_close(row[-len(stream) :], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_another_text_is_an_error_although_the_decoder_gets_embeddings(models, tmp_path):
    model, cache = models[0], StreamingCache.for_model(models[0], num_kept=1, window=5, chunk_size=4)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    streams = [tiny.random_ids(n, seed=n)[0] % 98 for n in (9, 6)]
    ids, mask = pad_left(streams)
    text = model.generate(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **options)
    text, mask = torch.cat((text, ids), dim=1), torch.cat((mask, torch.ones(2, 13, dtype=torch.long)), dim=1)
    cache.save(tmp_path / "cache")
    for used in (cache, StreamingCache.load(tmp_path / "cache", model)):
        with pytest.raises(ValueError, match=r"does not begin with the 12 tokens .*rows \[0, 1\]"):
            model.generate(input_ids=text.flip(0), attention_mask=mask.flip(0), **{CACHE: used}, **options)
        model.generate(input_ids=text, attention_mask=mask, **{CACHE: used}, **options)


def test_ids_that_generate_names_are_those_of_its_own_pass_only(models):
    """Other passes over embeddings read a text that is not known."""
    model, cache = models[0], StreamingCache.for_model(models[0], num_kept=1, window=5)
    ids = tiny.random_ids(9) % 98

    def generate():
        model.generate(input_ids=ids, **{CACHE: cache}, max_new_tokens=3, do_sample=False, eos_token_id=None)

    def read(text):
        with torch.no_grad():
            model(text, use_cache=True, **{CACHE: cache})
        return cache.streams.record.is_known

    interrupted = patch.object(model.get_input_embeddings(), "forward", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        generate()
    assert not read(ids.flip(1))
    cache.reset()
    generate()
    assert cache.streams.record.is_known
    assert not read(ids[:, :1])


def test_masks_of_other_texts_are_an_error():
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    image, padded, hole = causal.clone(), causal.clone(), causal.clone()
    image[..., 1, 2] = True
    padded[..., 3] = False
    hole[..., 2, 1] = False
    assert text_mask({"full_attention": causal}, 4).all()
    assert text_mask({"full_attention": padded}, 4).tolist() == [[1, 1, 1, 0]]  # on the right: an error of the cache
    for other in (image, hole):
        with pytest.raises(ValueError, match="does not support images"):
            text_mask({"full_attention": other}, 4)
    assert text_mask({"full_attention": None}, 4) is None
    of_flash_attention = torch.tensor([[0, 1, 1, 1]])
    assert text_mask({"full_attention": of_flash_attention, "sliding_attention": None}, 4) is of_flash_attention


def test_images_that_only_windowed_layers_see_are_an_error():
    """In Gemma 4, tokens of an image see each other in windowed layers; the others are causal."""
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    window = causal & torch.ones(4, 4, dtype=torch.bool).triu(-1)
    image, padded = window.clone(), causal.clone()
    image[..., 1, 2] = True
    padded[..., 0] = False
    assert text_mask({"full_attention": None, "sliding_attention": window}, 4) is None
    assert text_mask({"full_attention": padded, "sliding_attention": window & padded}, 4).tolist() == [[0, 1, 1, 1]]
    for full in (None, causal, padded):
        with pytest.raises(ValueError, match="does not support images"):
            text_mask({"full_attention": full, "sliding_attention": image}, 4)


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(1, 4))
def test_rows_are_padded_on_the_left(rows, num_inputs):
    is_token = which_are_tokens(torch.tensor(rows), len(rows), num_inputs)
    inputs = [row[4 - num_inputs :] for row in rows]
    if all(map(all, inputs)):
        assert is_token is None
        return
    assert is_token is not None
    assert is_token.tolist() == [[value == 1 for value in row] for row in inputs]
    padded = [i for i, row in enumerate(inputs) if "1" in (text := "".join(map(str, row))) and text.endswith("0")]
    if not padded:
        check_padding(is_token)
        return
    with pytest.raises(ValueError, match=f"row {padded[0]} of the batch has padding on the right"):
        check_padding(is_token)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 1], r"attention_mask has shape \(2,\)"),
        ([[1, 1], [1, 1], [1, 1]], r"attention_mask has shape \(3, 2\)"),
        ([[1], [1]], r"at least the 2 new tokens of 2 rows"),
        ([[0, 1], [2, 1]], "values other than 0"),
    ],
)
def test_what_is_no_mask_of_a_text_is_an_error(mask, message):
    with pytest.raises(ValueError, match=message):
        which_are_tokens(torch.tensor(mask), 2, 2)
