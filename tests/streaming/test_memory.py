"""The memory beyond the window equals a slow twin, in passes of any length."""

import copy
from functools import partial
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from sinklm.models.cache_argument import CACHE
from sinklm.streaming import (
    MemoryOptions,
    StreamingCache,
    StreamingDecoder,
    layer_memory,
    memory_blocks,
    stream_logits,
    stream_losses,
)
from sinklm.streaming.testing import random_model

from ..models.tiny import text, tiny_arm, tiny_model
from . import small_families, tiny

NUM_KEPT, WINDOW = 2, 10
OPTIONS = MemoryOptions(block_size=4, num_blocks=3, interval=2, representative_size=2)
SMALLEST = MemoryOptions(block_size=1, num_blocks=1, interval=1, representative_size=1)
LARGE = MemoryOptions(block_size=8, num_blocks=2, interval=5, representative_size=8)
UNALIGNED = MemoryOptions(block_size=8, num_blocks=2, interval=3, representative_size=8)


def new_cache(model, memory=OPTIONS, num_kept=NUM_KEPT):
    return StreamingCache.for_model(model, num_kept=num_kept, window=WINDOW, memory=memory)


@torch.no_grad()
def read(model, cache, ids, lengths):
    """Return the logits of ``ids``, read in passes of these lengths."""
    assert sum(lengths) == ids.shape[1]
    passes = [model(part, use_cache=True, **{CACHE: cache}).logits for part in ids.split(lengths, dim=1)]
    return torch.cat(passes, dim=1)


FAMILIES = [
    *("sink_gpt_neox", "gpt_neox", "llama", "mixtral", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss", "phi", "glm4"),
    *("cohere", "smollm3", "deepseek_v3", "gptj", "codegen", "falcon", "olmo2", "granite", "ernie4_5", "stablelm"),
]


def llama():
    model = tiny.build(tiny.config("llama"))
    tiny.use_float64(model)
    return model


# -- A slow twin -------------------------------------------------------------------------------


class SlowMemory:
    """Attention to kept tokens, window and memory of one stream, one query after the other.

    Queries ``(H, T, D)`` and keys ``(G, T, D)`` have no rotary positions yet.
    """

    def __init__(self, config, options):
        self.options = options
        head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)

    def rotated(self, state, distance):
        """Turn a state ``(…, D)`` by a number of positions."""
        angles = distance * self.theta
        a, b = state.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    def score(self, query, key, distance):
        return self.rotated(query, distance) @ key / len(query) ** 0.5

    def attend(self, queries, keys, values):
        per_group = len(queries) // len(keys)
        return torch.stack([self.head(queries, keys, values, h, h // per_group) for h in range(len(queries))])

    def head(self, queries, keys, values, head, group):
        return torch.stack([self.token(queries, keys[group], values[group], head, t) for t in range(queries.shape[1])])

    def token(self, queries, keys, values, head, token):
        group = range(len(queries))[head // 2 * 2 : head // 2 * 2 + 2]  # two heads share keys
        query, seen = queries[head, token], [*range(max(NUM_KEPT, token - WINDOW), token + 1)]
        distances = {key: token - key for key in seen}
        distances |= {i: min(token, NUM_KEPT + WINDOW) - i for i in range(min(NUM_KEPT, token + 1))}
        for block in self.chosen(queries[list(group)], keys, token):
            start, size = NUM_KEPT + block * self.options.block_size, self.options.block_size
            distances |= {start + i: WINDOW + size - i for i in range(size)}
        scores = torch.stack([self.score(query, keys[key], distance) for key, distance in distances.items()])
        return scores.softmax(0) @ values[list(distances)]

    def chosen(self, queries, keys, token):
        """Return the blocks that a token sees: those to which the last queries before and at the
        beginning of its interval attend most."""
        size, begin = self.options.block_size, token - token % self.options.interval
        blocks = [b for b in range(begin) if NUM_KEPT + (b + 1) * size <= begin - WINDOW]
        if len(blocks) <= self.options.num_blocks:
            return blocks
        total = torch.zeros(len(blocks)).double()
        for query in queries[:, begin - self.options.interval + 1 : begin + 1].flatten(0, 1):
            kept = [self.score(query, keys[i], NUM_KEPT + WINDOW - i) for i in range(NUM_KEPT)]
            best = [max(self.representative_scores(query, keys, block)) for block in blocks]
            total += torch.stack(kept + best).softmax(0)[NUM_KEPT:]
        return total.topk(self.options.num_blocks).indices.tolist()

    def representative_scores(self, query, keys, block):
        """Scores of the means of consecutive keys of a block, each turned to its place in it."""
        size, start = self.options.block_size, NUM_KEPT + block * self.options.block_size
        turned = torch.stack([self.rotated(keys[start + i], i) for i in range(size)])
        means = turned.unflatten(0, (-1, self.options.representative_size)).mean(1)
        return [self.score(query, mean, WINDOW + size) for mean in means]


@torch.no_grad()
def slow_logits(model, ids, options, monkeypatch):
    slow = SlowMemory(model.config, options)

    def attend(module, query, key, value, mask, **kwargs):
        return slow.attend(query[0], key[0], value[0]).transpose(0, 1)[None], None

    AttentionInterface.register("slow_memory", attend)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda query, key, *rest, **named: (query, key))
    monkeypatch.setattr(model.config, "_attn_implementation", "slow_memory")
    logits = model(ids, use_cache=False).logits
    monkeypatch.undo()
    return logits


@pytest.mark.parametrize("options", [OPTIONS, SMALLEST, LARGE, UNALIGNED], ids=str)
def test_it_equals_the_slow_twin(options, monkeypatch):
    model = llama()
    ids = tiny.random_ids(34)
    expected = slow_logits(model, ids, options, monkeypatch)
    without = read(model, new_cache(model, None), ids, [34])
    assert not torch.allclose(without, expected)
    for lengths in ([34], [1] * 34):
        found = read(model, new_cache(model, options), ids, lengths)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# -- Passes of any length ----------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 79), max_size=12),
    options=st.sampled_from([OPTIONS, SMALLEST, LARGE, UNALIGNED]),
    num_bytes=st.sampled_from([1, 20_000, layer_memory.NUM_BYTES]),
    num_index_bytes=st.sampled_from([1, memory_blocks.NUM_INDEX_BYTES]),
)
def test_passes_of_any_length_have_the_same_result(cuts, options, num_bytes, num_index_bytes):
    model, ids = llama(), tiny.random_ids(80, batch_size=2)
    lengths = [b - a for a, b in pairwise([0, *sorted(cuts), 80])]
    whole = read(model, new_cache(model, options), ids, [80])
    with (
        mock.patch.object(layer_memory, "NUM_BYTES", num_bytes),
        mock.patch.object(memory_blocks, "NUM_INDEX_BYTES", num_index_bytes),
    ):
        parts = read(model, new_cache(model, options), ids, lengths)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_right_before_the_window_is_seen_as_without_a_cache(name):
    """Only then does a block have its true distances. With one layer, keys have no context."""
    config = small_families.config(name)
    config._attn_implementation = "eager"  # SDPA of transformers 5.17 ignores the softcap of Gemma 2
    if name != "llama4_text":  # has its layers without positions by their numbers
        config.num_hidden_layers = 1
        for setting in ("layer_types", "no_rope_layers", "layer_windows", "mlp_layer_types"):
            if isinstance(getattr(config, setting, None), list):
                setattr(config, setting, getattr(config, setting)[-1:])
    model = random_model(config)
    options = MemoryOptions(block_size=4, num_blocks=1, interval=2, representative_size=2)
    ids, last = tiny.random_ids(WINDOW + 5), WINDOW + options.block_size
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, last]
    for lengths in ([WINDOW + 5], [1] * (WINDOW + 5)):
        found = read(model, new_cache(model, options, num_kept=0), ids, lengths)[:, last]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "gptj", "gemma2", "gemma3_text", "smollm3", "deepseek_v3", "gpt_oss"])
def test_families_have_the_same_result(name):
    model = random_model(small_families.config(name))
    check_passes(model, tiny.random_ids(60), tolerance=1e-4)


@pytest.mark.parametrize("model", [lambda: tiny_model(2), *(partial(tiny_arm, arm) for arm in ("logit", "kv_bias"))])
def test_models_with_sinks_have_the_same_result(model):
    model = model()
    check_passes(model, text(1, 60), tolerance=1e-5)


def check_passes(model, ids, tolerance):
    """The memory changes the result, and passes of other lengths do not."""
    num_tokens = ids.shape[1]
    whole, single, without = (
        read(model, new_cache(model, memory), ids, lengths)
        for memory, lengths in ((OPTIONS, [num_tokens]), (OPTIONS, [1] * num_tokens), (None, [num_tokens]))
    )
    torch.testing.assert_close(single, whole, rtol=0, atol=tolerance)
    first = NUM_KEPT + WINDOW  # the blocks before this token's interval are all in the window
    torch.testing.assert_close(whole[:, :first], without[:, :first], rtol=0, atol=tolerance)
    assert (whole - without)[:, -20:].abs().max() > 100 * tolerance


def test_scores_of_a_text_are_those_of_a_cache_with_the_memory():
    model, ids = llama(), tiny.random_ids(60)
    expected = read(model, new_cache(model), ids, [1] * 60)
    arguments = {"num_kept": NUM_KEPT, "window": WINDOW, "memory": OPTIONS, "chunk_size": 25}
    logits = torch.cat(list(stream_logits(model, ids, **arguments)), dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    losses = torch.cat(list(stream_losses(model, ids, **arguments)), dim=1)
    by_hand = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(losses[0].double(), by_hand, rtol=0, atol=1e-5)


def test_half_precision_is_close():
    model, ids = random_model(small_families.config("llama")), tiny.random_ids(60)
    expected = read(model, new_cache(model), ids, [60])
    model = model.bfloat16()
    for lengths in ([60], [1] * 60):
        error = (read(model, new_cache(model), ids, lengths).float() - expected).abs()
        assert error.median() < 0.02 * expected.std()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_step_has_the_same_result(backend):
    """The second backend copies what an operator changes, and copies it back."""
    model, ids = llama(), tiny.random_ids(60)
    expected = read(model, new_cache(model), ids, [60])
    torch._dynamo.reset()
    decoder = StreamingDecoder(model, new_cache(model), compile={"backend": backend})
    logits = [decoder.prefill(ids[:, :5])] + [decoder(ids[:, i : i + 1]).clone() for i in range(5, 60)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 4:], rtol=0, atol=1e-9)


# -- The interface of the cache ----------------------------------------------------------------


@pytest.mark.parametrize("num_read", [11, 16, 50, 57])
def test_copies_and_files_continue_alike(num_read, tmp_path):
    model, ids = llama(), tiny.random_ids(90)
    cache = new_cache(model)
    read(model, cache, ids[:, :num_read], [num_read])
    twin = copy.deepcopy(cache)
    cache.save(tmp_path / "stream.safetensors")
    loaded = StreamingCache.load(tmp_path / "stream.safetensors", model)
    assert loaded.memory.options == OPTIONS
    assert twin.num_host_bytes == loaded.num_host_bytes == cache.num_host_bytes
    rest = ids[:, num_read:]
    expected = read(model, cache, rest, [1] * rest.shape[1])
    for other in (twin, loaded):
        assert torch.equal(read(model, other, rest, [1] * rest.shape[1]), expected)


def test_rows_can_be_reordered_and_repeated():
    model, ids = llama(), tiny.random_ids(80, batch_size=2)
    rows = torch.tensor([1, 1, 0])
    expected = read(model, new_cache(model), ids, [80])[rows, 50:]
    cache = new_cache(model)
    read(model, cache, ids[:, :50], [50])
    cache.batch_select_indices(rows)
    torch.testing.assert_close(read(model, cache, ids[rows, 50:], [1] * 30), expected, rtol=0, atol=1e-9)


def test_rows_can_be_repeated_after_all_blocks_were_removed():
    model, ids = llama(), tiny.random_ids(60)
    cache = new_cache(model)
    read(model, cache, ids[:, :10], [10])
    cache.crop(-8)
    cache.batch_repeat_interleave(3)
    expected = read(model, new_cache(model), ids, [60])
    found = read(model, cache, ids[:, 2:].expand(3, -1), [58])
    torch.testing.assert_close(found, expected[:, 2:].expand(3, -1, -1), rtol=0, atol=1e-9)


def test_copies_continue_with_different_texts():
    """They share blocks until they add some of their own."""
    model, texts = llama(), [tiny.random_ids(90, seed=seed) for seed in (1, 2, 3)]
    for other in texts[1:]:
        other[:, :40] = texts[0][:, :40]
    caches = [new_cache(model)]
    read(model, caches[0], texts[0][:, :40], [40])
    caches += [copy.deepcopy(caches[0])]
    caches += [copy.deepcopy(caches[1])]
    logits = [[] for _ in caches]
    for start in range(40, 90, 5):
        for i, (cache, ids) in enumerate(zip(caches, texts, strict=True)):
            logits[i].append(read(model, cache, ids[:, start : start + 5], [5]))
    for found, ids in zip(logits, texts, strict=True):
        expected = read(model, new_cache(model), ids, [90])[:, 40:]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-9)


def test_blocks_of_equal_weight_are_chosen_alike():
    """In the first layer, a token has the same representative wherever it is repeated."""
    model, ids = llama(), tiny.random_ids(8).repeat(1, 12)
    options = MemoryOptions(block_size=4, num_blocks=2, interval=1, representative_size=1)
    whole, single = (read(model, new_cache(model, options), ids, lengths) for lengths in ([96], [1] * 96))
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-9)


def test_autocast_is_close():
    model, ids = random_model(small_families.config("llama")), tiny.random_ids(60)
    expected = read(model, new_cache(model), ids, [60])
    for lengths in ([60], [1] * 60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = (read(model, new_cache(model), ids, lengths).float() - expected).abs()
        assert error.median() < 0.02 * expected.std()


def test_removed_tokens_leave_the_blocks():
    model, ids = llama(), tiny.random_ids(60)
    cache = new_cache(model)
    read(model, cache, tiny.random_ids(13, seed=2).index_copy(1, torch.arange(3), ids[:, :3]), [13])
    cache.crop(-10)
    expected = read(model, new_cache(model), ids, [60])
    torch.testing.assert_close(read(model, cache, ids[:, 3:], [5, *[1] * 52]), expected[:, 3:], rtol=0, atol=1e-9)


def test_a_reset_cache_is_like_a_new_one():
    model, ids = llama(), tiny.random_ids(60)
    cache = new_cache(model)
    expected = read(model, cache, ids, [60])
    cache.reset()
    assert cache.num_host_bytes == 0
    assert torch.equal(read(model, cache, ids, [60]), expected)


def test_a_new_stream_may_begin_with_one_token_after_a_choice():
    model, ids = llama(), tiny.random_ids(30)
    expected, cache = read(model, new_cache(model, SMALLEST), ids, [30]), new_cache(model, SMALLEST)
    for _ in range(2):
        found = read(model, cache, ids, [1] * 30)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        cache.reset()


def test_a_cache_of_inference_mode_and_another_default_device_can_be_used_outside():
    model, ids = llama(), tiny.random_ids(40)
    expected = read(model, new_cache(model), ids, [40])
    with torch.inference_mode(), torch.device("meta"):
        cache = new_cache(model)
    torch.testing.assert_close(read(model, cache, ids, [1] * 40), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("interrupted", ["select", "write_after"])
def test_interrupted_steps_can_be_repeated(interrupted, is_compiled, monkeypatch):
    """Choosing and storing are interrupted after the first layer."""
    model, ids = llama(), tiny.random_ids(60)
    expected, cache = read(model, new_cache(model), ids, [60]), new_cache(model)
    read(model, cache, ids[:, :40], [40])
    torch._dynamo.reset()
    decoder = StreamingDecoder(model, cache, compile={"backend": "eager"})
    owner, calls = memory_blocks if interrupted == "select" else memory_blocks.HostBlocks, []
    function = getattr(owner, interrupted)

    def interrupting(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*arguments)

    def step(token):
        return decoder(ids[:, token : token + 1]) if is_compiled else read(model, cache, ids[:, token : token + 1], [1])

    monkeypatch.setattr(owner, interrupted, interrupting)
    logits = []
    while len(logits) < 14:
        try:
            logits.append(step(40 + len(logits)))
        except KeyboardInterrupt:
            assert len(calls) == 2
    assert len(calls) > 2
    with monkeypatch.context() as context:
        for owner, name in ((decoder, "_run"), (model.model.layers[1], "forward")):  # compiled, and eager
            context.setattr(owner, name, lambda *arguments, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(54)
    logits += [step(token) for token in range(54, 60)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 40:], rtol=0, atol=1e-9)


def test_layers_store_together_what_each_would_alone():
    keys, values = torch.randn(2, 3 * 2, 4, 5, 8, 16)  # three layers of two rows
    alone, together = ([memory_blocks.HostBlocks(representative_size=4) for _ in range(3)] for _ in range(2))
    for part in (slice(0, 2), slice(2, 5)):
        memory_blocks.append_to(together, keys[:, :, part], values[:, :, part])
        for blocks, *own in zip(alone, keys[:, :, part].chunk(3), values[:, :, part].chunk(3), strict=True):
            blocks.append(*own)
    for blocks, twin in zip(together, alone, strict=True):
        assert all(torch.equal(states, twin.buffers[name]) for name, states in blocks.buffers.items())
    first = keys[:2].mean() + values[:2].mean()
    assert together[0].buffers["keys"].mean() + together[0].buffers["values"].mean() == pytest.approx(first.item())


def test_copies_and_removed_blocks_need_no_larger_buffers():
    blocks, states = memory_blocks.HostBlocks(representative_size=1), torch.randn(1, 1, 2, 1, 1)
    for _ in range(3):
        blocks.append(states, states)
        blocks.truncate(1)
        blocks = blocks.shared()
    blocks.append(states, states)
    assert len(blocks) == 3
    assert len(blocks.keys) == 16


def test_a_text_that_was_read_in_inference_mode_can_be_continued_outside():
    model, ids = llama(), tiny.random_ids(60)
    cache = new_cache(model)
    with torch.inference_mode():
        read(model, cache, ids[:, :30], [29, 1])
    found = read(model, cache, ids[:, 30:], [1, 1, 10, *[1] * 18])
    torch.testing.assert_close(found, read(model, new_cache(model), ids, [60])[:, 30:], rtol=0, atol=1e-9)


def test_only_host_memory_grows():
    model = llama()
    cache = new_cache(model)
    read(model, cache, tiny.random_ids(100), [100])
    on_device, on_host = cache.num_bytes, cache.num_host_bytes
    read(model, cache, tiny.random_ids(900), [900])
    assert cache.num_bytes == on_device
    used = sum(buffer.nbytes for layer in cache.streams.layers for buffer in layer.memory.blocks.buffers.values())
    num_states = (1000 - NUM_KEPT) // OPTIONS.block_size * (2 * OPTIONS.block_size + OPTIONS.num_representatives)
    assert used == num_states * 2 * 2 * 12 * 8  # layers, heads, dimensions and bytes
    assert on_host < cache.num_host_bytes <= 2 * used


def test_a_cache_without_memory_has_none():
    cache = new_cache(llama(), None)
    assert cache.memory is None
    assert cache.num_host_bytes == 0
    assert all(layer.memory is None for layer in cache.streams.layers)


# -- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size of the memory is 0: it must be a whole number of at least 1"),
        ({"num_blocks": -1}, "num_blocks of the memory is -1"),
        ({"num_blocks": 2.5}, "num_blocks of the memory is 2.5: it must be a whole number"),
        ({"interval": True}, "interval of the memory is True: it must be a whole number"),
        ({"block_size": "64"}, "block_size of the memory is '64': it must be a whole number"),
        ({"block_size": 6}, "it must divide the block_size of 6"),
        ({"block_size": 4, "interval": 5}, "interval of the memory is 5: it must be at most the block_size of 4"),
    ],
)
def test_invalid_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryOptions(**options)


def test_models_that_cannot_have_a_memory_are_an_error():
    with pytest.raises(ValueError, match="this model has ALiBi"):
        new_cache(tiny.build(tiny.config("mpt")))
    with pytest.raises(ValueError, match="no layer sees as far as 14 tokens"):
        new_cache(random_model(small_families.config("mistral:window")))
    with pytest.raises(ValueError, match="at most the window of 10"):
        new_cache(llama(), MemoryOptions(block_size=16))
    with pytest.raises(TypeError, match=r"memory is '8x64': pass MemoryOptions"):
        new_cache(llama(), "8x64")
    with pytest.raises(ValueError, match="a memory or quantized"):
        StreamingCache.for_model(llama(), num_kept=2, window=40, kv_dtype="int8", memory=OPTIONS)


def test_layers_whose_windows_cover_the_blocks_have_a_memory():
    model = tiny.build(tiny.config("mistral:sliding"))  # a window of 13 tokens
    for block_size, has_memory in ((3, True), (4, False)):
        options = MemoryOptions(block_size=block_size, interval=2, representative_size=block_size)
        if has_memory:
            assert all(layer.memory is not None for layer in new_cache(model, options).streams.layers)
        else:
            with pytest.raises(ValueError, match="no layer sees as far as 14 tokens"):
                new_cache(model, options)
    layers = new_cache(random_model(small_families.config("gemma2"))).streams.layers
    assert [layer.memory is not None for layer in layers] == [False, True]


def test_rows_of_different_lengths_are_an_error():
    model, ids = llama(), tiny.random_ids(4, batch_size=2)
    cache = new_cache(model)
    with pytest.raises(ValueError, match="with a memory does not support padding"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), use_cache=True, **{CACHE: cache})
    read(model, cache, ids, [4])
    with pytest.raises(ValueError, match="reset all rows"):
        cache.reset([0])


@pytest.mark.gpu
def test_a_gpu_reads_the_blocks_in_host_memory():
    expected, blocks = (memory_blocks.HostBlocks(representative_size=2) for _ in range(2))
    for num_blocks in (5, 30):  # the second time, the buffers grow
        states = [torch.randn(2, 3, num_blocks, 4, 8, dtype=torch.bfloat16) for _ in range(2)]
        expected.append(*states)
        blocks.append(*(state.cuda() for state in states))
        chosen = torch.randint(len(blocks), (2, 3, 6, 7))
        assert blocks.seen_from("keys", torch.device("cuda", 0)).data_ptr() == blocks.keys.data_ptr()
        for found, twin in zip(blocks.gather(chosen.cuda()), expected.gather(chosen), strict=True):
            assert found.is_cuda
            assert torch.equal(found.cpu(), twin)
        assert len(blocks.shared().seen) == 2
    parts = memory_blocks.index_parts(blocks, len(blocks), torch.device("cuda", 0))
    assert torch.equal(torch.cat([part.cpu() for part in parts], dim=2), expected.index[:35].movedim(0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [OPTIONS, SMALLEST, UNALIGNED], ids=str)
def test_the_captured_step_has_the_same_result_on_a_gpu(options, dtype):
    """Steps that choose and steps that do not are two graphs. No kernel chooses in float64."""
    model, ids = tiny.build(tiny.config("llama"), dtype=dtype), tiny.random_ids(80)
    expected = read(model, new_cache(model, options), ids, [80])
    model = model.cuda()
    torch._dynamo.reset()
    decoder = StreamingDecoder(model, new_cache(model, options))
    logits = [decoder.prefill(ids[:, :5].cuda())]
    logits += [decoder(ids[:, i : i + 1].cuda()).clone() for i in range(5, 80)]
    assert set(decoder.captured) == ({False, True} if dtype == torch.float32 else {False})
    torch.testing.assert_close(torch.cat(logits, dim=1).cpu(), expected[:, 4:], rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_captured_graphs_go_on_after_rows_are_reordered():
    model, ids, rows = tiny.build(tiny.config("llama"), dtype=torch.float32), tiny.random_ids(90, batch_size=2), [1, 0]
    expected = read(model, new_cache(model), ids, [90])
    model = model.cuda()
    torch._dynamo.reset()
    decoder = StreamingDecoder(model, cache := new_cache(model))
    logits = [decoder.prefill(ids[:, :5].cuda())]
    for i in range(5, 90):
        if i == 50:
            assert set(decoder.captured) == {False, True}
            cache.reorder_cache(torch.tensor(rows, device="cuda"))
        new = decoder((ids if i < 50 else ids[rows])[:, i : i + 1].cuda())
        logits.append((new if i < 50 else new[rows]).clone())
    torch.testing.assert_close(torch.cat(logits, dim=1).cpu(), expected[:, 4:], rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_half_precision_on_a_gpu_is_as_close_as_on_a_cpu(name):
    model, ids = random_model(small_families.config(name)), tiny.random_ids(80)
    expected = read(model, new_cache(model), ids, [80])
    on_cpu = read(model.bfloat16(), new_cache(model), ids, [80])
    on_gpu = read(model.cuda(), new_cache(model), ids.cuda(), [80]).cpu()
    assert (on_gpu - expected).abs().median() < 2 * (on_cpu - expected).abs().median()
