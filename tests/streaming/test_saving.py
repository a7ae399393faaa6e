"""A saved and loaded cache continues exactly as one that was not saved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sinklm.streaming import Chat, Generator, MemoryOptions, StreamingCache, saving
from sinklm.streaming.saving import fingerprint

from ..eval.checkpoints import small_model
from ..models.tiny import tiny_model
from . import tiny
from .test_chat import TEMPLATE, start, tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.config("llama", num_hidden_layers=1), dtype=torch.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "cache.safetensors"


def masked(num_tokens: int, is_ragged: bool, seed: int):
    """Two rows, the second shorter by padding if ragged."""
    mask = torch.ones(2, num_tokens, dtype=torch.long)
    if is_ragged:
        mask[1, : (num_tokens + 1) // 2] = 0
    return tiny.random_ids(num_tokens, batch_size=2, seed=seed), mask


def test_only_a_file_with_a_memory_needs_a_version_that_knows_it(model, file, monkeypatch):
    monkeypatch.setattr(saving, "NEWEST_VERSION", saving.VERSION_WITHOUT_MEMORY)  # as before there was a memory
    StreamingCache.for_model(model, num_kept=1, window=4).save(file)
    StreamingCache.load(file, model)
    StreamingCache.for_model(model, num_kept=1, window=8, memory=MemoryOptions(block_size=8)).save(file)
    with pytest.raises(ValueError, match="was written by a newer version of sinklm: install that version"):
        StreamingCache.load(file, model)
    monkeypatch.undo()
    StreamingCache.load(file, model)


@torch.no_grad()
def read(model, cache, passes):
    return [
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[mask.bool()]
        for ids, mask in passes
    ]


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.booleans()), min_size=2, max_size=6),
    data=st.data(),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9)),
    kv_dtype=st.sampled_from([None, "int8", "int4"]),
)
def test_saving_at_any_point_changes_nothing(model, file, lengths, data, shape, kv_dtype):
    passes = [masked(length, is_ragged, seed) for seed, (length, is_ragged) in enumerate(lengths)]
    num_before = data.draw(st.integers(0, len(passes)))
    window = shape[1] + 32 * bool(kv_dtype)
    cache = StreamingCache.for_model(model, num_kept=shape[0], window=window, chunk_size=8, kv_dtype=kv_dtype)
    read(model, cache, passes[:num_before])
    cache.save(file)
    loaded = StreamingCache.load(file, model)
    assert loaded.num_bytes == cache.num_bytes
    assert repr(loaded) == repr(cache)
    for name in ("num_since_rebase", "is_ragged"):
        assert getattr(loaded.streams, name) == getattr(cache.streams, name)
    for expected, found in zip(
        read(model, cache, passes[num_before:]), read(model, loaded, passes[num_before:]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("build", [lambda: tiny.build(tiny.config("mpt")), lambda: tiny_model(num_sinks=2)])
def test_generation_continues_and_still_knows_its_text(build, file):
    model, options = build(), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": True}
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    text = model.generate(tiny.random_ids(11), past_key_values=cache, **options)
    cache.save(file)
    loaded = StreamingCache.load(file, model)
    turn = torch.cat((text, tiny.random_ids(3, seed=4)), dim=1)
    with pytest.raises(ValueError, match="does not begin with"):
        model.generate(turn.roll(1, dims=1), past_key_values=loaded, **options)
    expected = model.generate(turn, past_key_values=cache, **options)
    assert model.generate(turn, past_key_values=loaded, **options).tolist() == expected.tolist()


def changed_weight(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] += 1e-3
    return model


def swapped_rows(model):
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[:2] = weight[:2].flip(0)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_weight, "another model: the weights differ"),
        (swapped_rows, "another model: the weights differ"),
        (lambda model: model.double(), "saved with a model in torch.float32, this model is in torch.float64"),
        (
            lambda _: tiny.build(tiny.config("llama:linear", num_hidden_layers=1), dtype=torch.float32),
            "whose rope_parameters differs: load that model",
        ),
        (lambda _: tiny.build(tiny.config("llama:linear", num_hidden_layers=1)), "saved with another model, whose"),
        (
            lambda _: tiny.build(tiny.config("gpt_neox", num_hidden_layers=1), dtype=torch.float32),
            "saved with another model, whose",
        ),
    ],
)
def test_another_model_is_an_error(model, file, change, message):
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    read(model, cache, [masked(7, False, 0)])
    cache.save(file)
    StreamingCache.load(file, copy.deepcopy(model))
    with pytest.raises(ValueError, match=message):
        StreamingCache.load(file, change(copy.deepcopy(model)))


def test_a_model_without_its_last_layers_continues(file):
    """Its config may still count them."""
    model, ids = tiny.build(tiny.config("llama")), tiny.random_ids(12)
    model.model.layers = model.model.layers[:1]
    cache = StreamingCache.for_model(model, num_kept=2, window=6)
    model(ids, past_key_values=cache)
    cache.save(file)
    logits = [model(ids, past_key_values=each).logits for each in (cache, StreamingCache.load(file, model))]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_each_save_reads_the_weights_again(model, file):
    """Changes through ``.data`` are not counted in a tensor's version."""
    model = copy.deepcopy(model)
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    cache.save(file)
    old = copy.deepcopy(model)
    changed_weight(model)
    cache.save(file)
    StreamingCache.load(file, model)
    with pytest.raises(ValueError, match="the weights differ"):
        StreamingCache.load(file, old)


def test_any_damage_is_an_error_of_one_line(model, tmp_path):
    file = tmp_path / "cache.safetensors"
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    read(model, cache, [masked(7, False, 0)])
    cache.save(file)
    content = file.read_bytes()
    damaged = [b"", content[:-9], content + b"more"]
    for place in (2, 100, len(content) // 3, len(content) // 2, len(content) - 1):
        damaged.append(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    for wrong in damaged:
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"cache\.safetensors is damaged|is not a file of") as error:
            StreamingCache.load(file, model)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="there is no file"):
        StreamingCache.load(tmp_path / "missing", model)
    with pytest.raises(OSError, match="it is a folder, pass a file"):
        StreamingCache.load(tmp_path, model)


@pytest.mark.parametrize("write", [lambda path: path.write_text("notes"), lambda path: save_file({}, path)])
def test_the_file_of_something_else_is_not_to_be_deleted(write, model, file):
    write(file)
    with pytest.raises(ValueError, match=r"no(t a)? file of StreamingCache\.save.*: choose another file") as error:
        StreamingCache.load(file, model)
    assert "delete" not in str(error.value)


def test_a_failed_save_leaves_the_older_file(model, tmp_path):
    file = tmp_path / "cache.safetensors"
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    cache.save(file)
    before = file.read_bytes()
    cache.is_damaged = True
    with pytest.raises(ValueError, match="failed midway"):
        cache.save(file)
    assert [file.read_bytes()] == [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_goes_on_after_a_restart(tmp_path, template):
    model, words = small_model(1), tokenizer(template)
    chat = start(model, words, window=40, max_new_tokens=5, system="Be brief.")
    restarted = None
    for number, message in enumerate(["Which way?", "And then?", "Is it far?", "How far?"]):
        reply = "".join(chat(message))
        if restarted is not None:
            assert "".join(restarted(message)) == reply
        (restarted or chat).save(tmp_path / "chat")
        restarted = Chat.load(tmp_path / "chat", words, model, max_new_tokens=5)
        assert restarted.history == chat.history
        assert len(chat.history) == 2 * (number + 1)
        assert chat.history[-1] == {"role": "assistant", "content": reply}
        assert restarted.generator.recent == chat.generator.recent
    with pytest.raises(ValueError, match="another chat template"):
        Chat.load(tmp_path / "chat", tokenizer("{{ 'other' }}"), model)


def test_a_cache_without_a_conversation_is_an_error(file):
    model = small_model(1)
    StreamingCache.for_model(model, num_kept=1, window=4).save(file)
    with pytest.raises(ValueError, match="no conversation"):
        Chat.load(file, tokenizer(), model)
    Generator(model, StreamingCache.load(file, model))


def test_an_interrupted_first_token_leaves_an_empty_cache(model, file, monkeypatch):
    cache = StreamingCache.for_model(model, num_kept=1, window=4)
    ids = tiny.random_ids(1)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[0].mlp), "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
    cache.save(file)
    loaded = StreamingCache.load(file, model)
    assert loaded.get_seq_length() == cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=loaded).logits, model(ids, past_key_values=cache).logits)


def test_the_fingerprint_does_not_depend_on_the_memory_of_a_weight(model):
    moved = copy.deepcopy(model)
    weight = moved.model.layers[0].mlp.up_proj.weight
    storage = torch.zeros(weight.numel() + 1)
    storage[1:] = weight.detach().flatten()
    weight.data = storage[1:].view_as(weight)
    assert fingerprint(moved.model) == fingerprint(model.model)
