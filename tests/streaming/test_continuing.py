"""`generate` with a used cache: another text is an error, and no correct use is."""

import copy
import gc

import pytest
import torch

from sinklm.models.config import num_prepended_sinks
from sinklm.streaming import StreamingCache
from sinklm.streaming.record import TextRecord, digest_of

from ..models.tiny import tiny_model
from . import tiny
from .test_batches import pad_left

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": True}
READ = "already in the cache followed by the new ones"


@pytest.fixture(scope="module", params=["llama", "sinks"])
def model(request):
    return tiny_model(num_sinks=2, dtype=torch.float32) if request.param == "sinks" else build("llama")


def build(family):
    return tiny.build(tiny.config(family), dtype=torch.float32)


def for_model(model, **settings):
    return StreamingCache.for_model(model, **{"num_kept": 2, "window": 6} | settings)


def turn(num_tokens, seed=5, batch_size=1):
    return tiny.random_ids(num_tokens, batch_size, seed=seed)


def generate(model, ids, cache, **options):
    return model.generate(ids, past_key_values=cache, **OPTIONS | options)


@pytest.mark.parametrize("num_tokens", [1, 5, 6, 11, 12, 13, 40])
def test_a_new_turn_alone_is_an_error_of_any_length(model, num_tokens):
    cache = for_model(model)
    text = generate(model, turn(9, seed=1), cache)
    with pytest.raises(ValueError, match=READ):
        generate(model, turn(num_tokens), cache)
    generate(model, torch.cat((text, turn(num_tokens)), dim=1), cache)  # the error has read nothing


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_text_that_differs_in_any_token_is_an_error(model, place):
    cache = for_model(model)
    text = torch.cat((generate(model, turn(9, seed=1), cache), turn(3)), dim=1)
    wrong = text.clone()
    wrong[0, place] = (wrong[0, place] + 1) % 90
    with pytest.raises(ValueError, match="does not begin with"):
        generate(model, wrong, cache)
    cache.reset()
    generate(model, wrong, cache)


def test_all_ways_to_continue_read_the_same(model):
    """The full text, also in chunks, only the new tokens with a mask of all, or own passes."""
    text = generate(model, turn(9, seed=1), None)
    new = torch.cat((text[:, -1:], turn(5)), dim=1)
    results = []
    for way in range(4):
        cache = for_model(model)
        text = generate(model, turn(9, seed=1), cache)
        full = torch.cat((text, new[:, 1:]), dim=1)
        new = full[:, text.shape[1] - 1 :]
        if way == 0:
            out = generate(model, full, cache)
        elif way == 1:
            out = generate(model, full, cache, prefill_chunk_size=2)
        elif way == 2:
            out = generate(model, new, cache, attention_mask=torch.ones_like(full))
        else:
            with torch.no_grad():
                model(new[:, :-1], past_key_values=cache)
            out = generate(model, full, cache)
        results.append(out[0, -4:].tolist())
        generate(model, torch.cat((out if way != 2 else torch.cat((full, out[:, -4:]), 1), turn(2)), dim=1), cache)
    assert results == [results[0]] * 4


def test_new_tokens_without_the_last_generated_one_are_an_error(model):
    cache = for_model(model)
    text = generate(model, turn(9, seed=1), cache)
    mask = torch.ones(1, text.shape[1] + 5, dtype=torch.long)
    with pytest.raises(ValueError, match="is not in the cache yet"):
        generate(model, turn(5), cache, attention_mask=mask)


def test_with_one_sink_a_forgotten_token_is_not_taken_for_the_sink():
    model = tiny_model(num_sinks=1, dtype=torch.float32)
    text = generate(model, turn(9, seed=1), cache := for_model(model))
    mask = torch.ones(1, text.shape[1] + 3, dtype=torch.long)
    with pytest.raises(ValueError, match="is not in the cache yet"):
        generate(model, turn(3), cache, attention_mask=mask)


def test_padded_batches_continue_and_other_texts_or_masks_are_errors(model):
    cache = for_model(model)
    ids, mask = pad_left([turn(9, seed=1)[0], turn(4, seed=2)[0]])
    text = generate(model, ids, cache, attention_mask=mask)
    more, ones = turn(3, batch_size=2), torch.ones(2, 7, dtype=torch.long)
    full, full_mask = torch.cat((text, more), dim=1), torch.cat((mask, ones), dim=1)
    for wrong in (full.flip(0), torch.cat((text[:1], text[:1]))):
        with pytest.raises(ValueError, match=r"rows \[.*1\]"):
            generate(model, torch.cat((wrong[:, : text.shape[1]], more), dim=1), cache, attention_mask=full_mask)
    with pytest.raises(ValueError, match="does not begin with"):
        generate(model, full, cache, attention_mask=torch.ones_like(full))
    generate(model, full, cache, attention_mask=full_mask)


def test_a_mask_that_hides_tokens_that_were_read_is_an_error(model):
    cache = for_model(model)
    text = generate(model, turn(9, seed=1, batch_size=2), cache)
    full = torch.cat((text, turn(3, batch_size=2)), dim=1)
    mask = torch.ones_like(full)
    mask[1, 10] = 0
    with pytest.raises(ValueError, match=r"padding that this StreamingCache has read as text \(rows \[1\]\)"):
        generate(model, full, cache, attention_mask=mask)


def test_rows_are_known_after_beams_copies_and_a_reset_of_rows(model):
    cache = for_model(model)
    ids = turn(9, seed=1, batch_size=2)
    text = generate(model, ids, cache)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    full = torch.cat((text, turn(3, batch_size=2)), dim=1)
    with pytest.raises(ValueError, match="does not begin with"):
        generate(model, full, cache)
    generate(model, full.flip(0), cache)
    generate(model, full, twin)
    twin.reset([1])
    seen = twin.get_seq_length() - num_prepended_sinks(model.config)
    mask = torch.ones(2, seen + 3, dtype=torch.long)
    mask[1, :seen] = 0
    wrong = turn(seen + 3, batch_size=2)
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        generate(model, wrong, twin, attention_mask=mask)


def test_embeddings_are_not_checked_but_their_length_is(model):
    cache, embed = for_model(model), model.get_input_embeddings()
    ids = turn(9, seed=1)
    out = model.generate(inputs_embeds=embed(ids), past_key_values=cache, **OPTIONS)
    full = torch.cat((ids, out, turn(3)), dim=1)
    with pytest.raises(ValueError, match="no new tokens"):
        model.generate(inputs_embeds=embed(turn(9)), past_key_values=cache, **OPTIONS)
    model.generate(inputs_embeds=embed(full), past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_assisted_generation_inside_the_cache_equals_generation_without(family):
    model, ids = build(family), turn(6, seed=1).repeat(1, 2)
    options = OPTIONS | {"max_new_tokens": 12}
    expected = model.generate(ids, **options)
    assistants = ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build(family)})
    for assistant in assistants:
        cache = for_model(model, window=60)
        text = model.generate(ids, past_key_values=cache, **options, **assistant)
        assert text.tolist() == expected.tolist()
        full = torch.cat((text, ids), dim=1)
        with pytest.raises(ValueError, match="does not begin with"):
            model.generate(full.roll(1, dims=1), past_key_values=cache, **options, **assistant)
        again = model.generate(full, past_key_values=cache, **options, **assistant)
        assert again.tolist() == model.generate(full, **options).tolist()
        model.generate(torch.cat((again, ids), dim=1), past_key_values=cache, **options)  # still known


def test_copies_of_a_model_check_their_own_caches(tmp_path):
    model = build("llama")
    cache = for_model(model)  # while it exists, the decoder's forward method is replaced
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not cache.is_initialized
    for twin in (copy.deepcopy(model), copy.copy(model), loaded):
        assert generate(twin, turn(5), None).tolist() == generate(model, turn(5), None).tolist()
        text = generate(twin, turn(5), own := for_model(twin))
        with pytest.raises(ValueError, match=READ):
            generate(twin, turn(9), own)
        assert text.shape == (1, 9)


def test_another_head_is_checked_and_methods_outlive_the_caches():
    model = build("llama")
    cache = for_model(model.model)  # of the decoder, which does not know its head
    kept = model.prepare_inputs_for_generation
    generate(model, turn(9, seed=1), cache)
    with pytest.raises(ValueError, match=READ):
        generate(model, turn(30), cache)
    del cache
    gc.collect()
    assert kept(turn(5), use_cache=True)["input_ids"].shape == (1, 5)


def test_new_tokens_alone_with_prompt_lookup_and_a_turn_after_beams_are_errors():
    model = build("llama")
    cache = for_model(model, window=60)
    full = torch.cat((generate(model, turn(9, seed=1), cache), turn(3)), dim=1)
    new = full[:, cache.get_seq_length() :]
    with pytest.raises(ValueError, match="cannot continue with new tokens alone"):
        generate(model, new, cache, attention_mask=torch.ones_like(full), prompt_lookup_num_tokens=3)
    cache.reset()
    full = torch.cat((generate(model, turn(9, seed=1), cache, num_beams=2), turn(3)), dim=1)
    for num_beams in (1, 2):
        with pytest.raises(ValueError, match=r"call reset\(\)"):
            generate(model, full.roll(1, dims=1), cache, num_beams=num_beams)


def test_the_record_does_not_depend_on_passes_and_forgets_what_is_removed():
    ids, mask = turn(20, batch_size=3), torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    whole, parts = (TextRecord.start(3, 30, torch.device("cpu")) for _ in range(2))
    whole.add(ids, mask, torch.tensor(0))
    for column in range(20):
        parts.add(ids[:, column : column + 1], mask[:, column : column + 1], torch.tensor(column))
    assert torch.equal(whole.digest, parts.digest)
    assert whole.has_read(ids, mask).all()
    assert not whole.has_read(ids, ~mask).any()
    record = TextRecord.start(3, 20, torch.device("cpu"))  # the largest text of which it can remove
    record.add(ids, None, torch.tensor(0))
    record.remove(6, torch.tensor(20))
    assert record.has_read(ids[:, :14], None).all()


def test_a_digest_is_that_of_whole_numbers_of_any_size():
    """Saved caches contain it, and no product of 64 bits may overflow."""
    prime, largest = 2**31 - 1, 2**31 - 2
    ids, columns = [[5, 0, 151_935, largest], [1, 2, 3, 4]], [0, 7, prime - 1, 2**40 + 3]
    is_token = [[True, True, True, True], [True, False, True, False]]
    expected = [
        [
            sum(
                pow(column % prime * of_column + token * of_id + constant, 3, prime)
                for token, column, counts in zip(row, columns, real, strict=True)
                if counts
            )
            % prime
            for of_column, of_id, constant in (
                (1_103_515_245, 22_695_477, 747_796_405),
                (1_664_525, 1_140_671_485, 214_013),
            )
        ]
        for row, real in zip(ids, is_token, strict=True)
    ]
    found = digest_of(torch.tensor(ids), torch.tensor(is_token), torch.tensor(columns))
    assert found.tolist() == expected


def test_exchanged_tokens_have_another_digest():
    columns = torch.arange(50)
    texts = torch.stack([turn(50)[0]] + [turn(50)[0].roll(n) for n in range(1, 50)])
    swapped = [texts[0].clone() for _ in range(49)]
    for place, text in enumerate(swapped):
        text[[place, place + 1]] = text[[place + 1, place]]
    texts = torch.unique(torch.cat((texts, torch.stack(swapped))), dim=0)
    assert len(torch.unique(digest_of(texts, None, columns), dim=0)) == len(texts)
