"""The compiled step is one graph and computes the same result."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sinklm.streaming import StreamingCache, StreamingDecoder, kernels
from sinklm.streaming.quantized import KV_DTYPES
from sinklm.streaming.testing import random_model, reference_logits

from ..models.tiny import plain_twin, sinks, tiny_model
from . import oracle, small_families, tiny


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@torch.no_grad()
def decoded(model, ids, prompt_length, num_kept, window, kv_dtype=None):
    """Return logits ``(T - prompt_length + 1, V)`` from the prompt on, and the compile counter."""
    counter = CompileCounter()
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, kv_dtype=kv_dtype)
    decoder = StreamingDecoder(model, cache, compile={"backend": counter})
    logits = [decoder.prefill(ids[:, :prompt_length])]
    logits += [decoder(ids[:, t : t + 1]) for t in range(prompt_length, ids.shape[1])]
    return torch.cat(logits, dim=1)[0], counter


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize(
    "family",
    [
        "gpt_neox",
        "mpt",
        "gptj",
        *(pytest.param(f, marks=LONG) for f in ("llama", "gemma3_text", "falcon", "falcon:rw")),
    ],
)
def test_a_stream_of_tokens_is_one_graph(family):
    layers = {"layer_types": ["sliding_attention"]} if family == "gemma3_text" else {}
    model, ids = tiny.build(tiny.config(family, num_hidden_layers=1, **layers)), tiny.random_ids(30)
    logits, counter = decoded(model, ids, 5, 2, 9)
    assert counter.frame_count == 1
    torch.testing.assert_close(logits, oracle.stream_logits(model, ids[0], 2, 9)[4:], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", *(pytest.param(f, marks=LONG) for f in ("llama4_text", "gemma2"))]
)
def test_other_kinds_of_layers_are_one_graph(family):
    """Layers without positions, experts, rotated dimensions at the end of a head, and windows."""
    model, ids = random_model(small_families.config(family)), tiny.random_ids(16)
    logits, counter = decoded(model, ids, 5, 1, 5)
    assert counter.frame_count == 1
    torch.testing.assert_close(logits, reference_logits(model, ids[0], 1, 5)[4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ["int4", pytest.param("int8", marks=LONG)])
def test_quantized_keys_and_values_are_one_graph(kv_dtype):
    model, ids = tiny.build(tiny.config("llama"), dtype=torch.float32), tiny.random_ids(60)
    logits, counter = decoded(model, ids, 45, 2, 40, kv_dtype)
    assert counter.frame_count == 1
    cache = StreamingCache.for_model(model, num_kept=2, window=40, kv_dtype=kv_dtype)
    pieces = ids.split([45] + [1] * 15, dim=1)
    with torch.no_grad():
        expected = torch.cat([model(piece, past_key_values=cache).logits[:, -1] for piece in pieces])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [8, 9, 17])
def test_a_prompt_is_read_in_parts_and_damages_the_cache_if_one_fails(num_tokens):
    model, ids, sizes = tiny.build(tiny.config("llama")), tiny.random_ids(num_tokens), []
    cache = StreamingCache.for_model(model, num_kept=2, window=6, chunk_size=8)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    decoder = StreamingDecoder(model, cache)
    whole = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=2, window=6, chunk_size=30)).prefill(ids)
    torch.testing.assert_close(decoder.prefill(ids), whole, rtol=0, atol=1e-5)
    assert sizes[0] == num_tokens
    assert max(sizes[1:]) == 8
    cache.reset()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: interrupt_at(cache, num_tokens))
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill(ids)
    assert cache.is_damaged


def interrupt_at(cache, num_tokens):
    """Interrupt the last pass over a prompt."""
    if cache.get_seq_length() + cache.step.num_inputs == num_tokens:
        raise KeyboardInterrupt


def test_tokens_may_be_views():
    """Another graph, compiled while a CUDA graph is captured, would fail."""
    model, ids = tiny.build(tiny.config("llama", num_hidden_layers=1)), tiny.random_ids(9, batch_size=2)
    counter = CompileCounter()
    cache = StreamingCache.for_model(model, num_kept=1, window=5)
    decoder = StreamingDecoder(model, cache, compile={"backend": counter})
    decoder.prefill(ids[:, :5])
    for tokens in (ids[:, 5:6], ids[:, 6:7].contiguous(), ids[:, 7:8].expand(2, 1).int(), ids.T.contiguous().T[:, 8:]):
        decoder(tokens)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        (torch.zeros(1, 1), "token_ids is torch.float32 on cpu: pass int64 ids on cpu"),
        (torch.zeros(1, 1, dtype=torch.bool), "token_ids is torch.bool on cpu"),
        (torch.zeros(1, 1, dtype=torch.long, device="meta"), "token_ids is torch.int64 on meta: pass int64 ids on cpu"),
        ([[1]], "token_ids is a list: pass a tensor of int64 ids"),
    ],
)
def test_what_are_no_ids_is_an_error(token_ids, expected):
    model = tiny.build(tiny.config("llama", num_hidden_layers=1))
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=1, window=5))
    decoder.prefill(tiny.random_ids(3))
    with pytest.raises(ValueError, match=expected):
        decoder(token_ids)


def test_frequencies_that_each_pass_chooses_are_an_error():
    model, ids = random_model(small_families.config("phi3:longrope")), tiny.random_ids(6)
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=1, window=5))
    decoder.prefill(ids)
    with pytest.raises(ValueError, match="rope_type 'longrope' is not one graph"):
        decoder(ids[:, :1])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@torch.no_grad()
def test_the_default_compiler_computes_the_same():
    model, ids = tiny.build(tiny.config("mpt")), tiny.random_ids(30)
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=2, window=9))
    logits = [decoder.prefill(ids[:, :5]), *(decoder(ids[:, t : t + 1]).clone() for t in range(5, 30))]
    expected = oracle.stream_logits(model, ids[0], 2, 9)[4:]
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=0, atol=1e-9)


def test_a_model_with_sinks_is_one_graph_too():
    model, ids = tiny_model(num_sinks=2), torch.randint(1, 300, (1, 30))
    logits, counter = decoded(model, ids, 3, 2, 9)
    assert counter.frame_count == 1
    with_sinks = torch.cat((sinks(model, 1), ids), dim=1)[0]
    torch.testing.assert_close(logits, oracle.stream_logits(plain_twin(model), with_sinks, 2, 9)[4:], rtol=0, atol=5e-5)


def test_prompts_may_come_in_between_and_the_cache_may_be_reset():
    model, ids = tiny.build(tiny.config("gpt_neox")), tiny.random_ids(60)
    cache = StreamingCache.for_model(model, num_kept=2, window=9)
    decoder = StreamingDecoder(model, cache, compile={"backend": "eager"})
    expected = oracle.stream_logits(model, ids[0], 2, 9)
    for _ in range(2):
        with pytest.raises(ValueError, match="prefill"):
            decoder(ids[:, :1])
        end = 0
        for size in (3, 1, 1, 25, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 12, 1, 1):
            piece, end = ids[:, end : end + size], end + size
            logits = decoder(piece) if size == 1 else decoder.prefill(piece)
            torch.testing.assert_close(logits[0, -1], expected[end - 1], rtol=0, atol=5e-5)
        cache.reset()


@torch.no_grad()
def test_inputs_and_buffers_are_checked_before_the_graph_runs():
    """Another batch size has other buffers, so the step is compiled again."""
    model, ids = tiny.build(tiny.config("llama")), tiny.random_ids(30, batch_size=2)
    cache = StreamingCache.for_model(model, num_kept=2, window=9)
    decoder = StreamingDecoder(model, cache, compile={"backend": "eager"})
    decoder.prefill(ids[:, :5])
    decoder(ids[:, 5:6])
    for wrong in (ids[:, 6:8], ids[:1, 6:7]):
        with pytest.raises(ValueError, match=r"one token of each stream, \(2, 1\)"):
            decoder(wrong)
    cache.batch_select_indices(torch.tensor([1]))
    assert decoder.compiled_for is not cache.streams.counters.num_seen
    logits = decoder(ids[1:, 6:7])
    assert decoder.compiled_for is cache.streams.counters.num_seen
    torch.testing.assert_close(logits[0, 0], oracle.stream_logits(model, ids[1, :7], 2, 9)[-1], rtol=0, atol=5e-5)
    cache.is_damaged = True
    with pytest.raises(ValueError, match="failed midway"):
        decoder(ids[1:, 7:8])


@torch.no_grad()
def test_each_decoder_and_batch_size_is_compiled_whatever_was_compiled_before():
    """torch compiles one code object at most eight times. With a limit of one, two are enough."""
    decoders = []
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch_size in (1, 2, 1, 2):
            if batch_size == 1:
                model = tiny.build(tiny.config("llama", num_hidden_layers=1))
                cache = StreamingCache.for_model(model, num_kept=2, window=6)
                decoders.append(StreamingDecoder(model, cache, compile={"backend": "eager"}))
            cache.reset()
            ids = tiny.random_ids(20, batch_size=batch_size)
            logits = [decoders[-1].prefill(ids[:, :5]), *(decoders[-1](ids[:, t : t + 1]) for t in range(5, 20))]
            expected = oracle.stream_logits(model, ids[-1], 2, 6)[4:]
            torch.testing.assert_close(torch.cat(logits, dim=1)[-1], expected, rtol=0, atol=5e-5)


@torch.no_grad()
def test_a_model_that_the_user_compiled_moves_phases_back_too():
    model, ids = tiny.build(tiny.config("llama", num_hidden_layers=1)), tiny.random_ids(30)
    compiled = torch.compile(model, backend="eager")
    cache, own = (StreamingCache.for_model(each, num_kept=2, window=6) for each in (compiled, model))
    logits = [compiled(piece, past_key_values=cache).logits for piece in ids.split([12] + [1] * 18, dim=1)]
    expected = oracle.stream_logits(model, ids[0], 2, 6)
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], expected, rtol=0, atol=5e-5)
    assert cache.streams.counters.base.item() >= 30 - 2 * cache.shape.num_slots > 0
    assert cache.steering is own.steering
    whole = torch.compile(model, backend="eager", fullgraph=True)  # calls without the cache are still one graph
    torch.testing.assert_close(whole(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_is_as_near_to_float64_as_eager_steps(dtype, family):
    """Run twice, so that the second decoder compiles a model that already had one."""
    model = tiny.build(tiny.config(family, hidden_size=128), dtype=torch.float64)
    ids = tiny.random_ids(80)
    exact = oracle.stream_logits(model, ids[0], 4, 24)[8:]
    model, ids = model.to("cuda", dtype), ids.cuda()
    for _ in range(2):
        decoder = StreamingDecoder(model, StreamingCache.for_model(model, num_kept=4, window=24))
        eager = StreamingCache.for_model(model, num_kept=4, window=24)
        captured, stepped = [decoder.prefill(ids[:, :9])], []
        with torch.no_grad():
            stepped.append(model(ids[:, :9], past_key_values=eager).logits[:, -1:])
            for t in range(9, 80):
                captured.append(decoder(ids[:, t : t + 1]).clone())
                stepped.append(model(ids[:, t : t + 1], past_key_values=eager).logits)
        assert decoder.captured is not None
        errors = [(torch.cat(logits, dim=1)[0].cpu().double() - exact).norm() for logits in (captured, stepped)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("family", "num_kept", "window"), [("gpt_neox", 0, 60), ("llama", 4, 60), ("llama", 1, 40)])
@torch.no_grad()
def test_a_captured_graph_is_the_quantized_step_without_the_kernel(family, num_kept, window, kv_dtype, monkeypatch):
    """Two ragged rows; the window wraps, and phases are moved back. A few codes differ by one."""
    model = tiny.build(tiny.config(family, hidden_size=128), dtype=torch.float32).cuda()
    ids = tiny.random_ids(200, batch_size=2).cuda()
    mask = torch.ones(2, 70, dtype=torch.long, device="cuda")
    mask[1, :30] = 0
    sizes = {"num_kept": num_kept, "window": window}
    plain, eager = (StreamingCache.for_model(model, **sizes, kv_dtype=name) for name in (None, kv_dtype))
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, **sizes, kv_dtype=kv_dtype))
    captured = [decoder.prefill(ids[:, :70], mask)]
    captured += [decoder(ids[:, t : t + 1]).clone() for t in range(70, 200)]
    assert decoder.captured is not None
    monkeypatch.setattr(kernels, "is_available", False)
    logits = []
    for cache in (plain, eager):
        logits.append([model(ids[:, :70], attention_mask=mask, past_key_values=cache).logits[:, -1:]])
        logits[-1] += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(70, 200)]
    exact, stepped, found = (torch.cat(parts, dim=1) for parts in (*logits, captured))
    assert (found - stepped).norm() < 0.1 * (stepped - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
def test_a_captured_step_makes_no_copy_of_the_buffers(kv_dtype):
    """A copy would take longer than the attention. Buffers are larger than cuBLAS's workspace."""
    model, ids = tiny.build(tiny.config("llama", hidden_size=128), dtype=torch.float32).cuda(), tiny.random_ids(16)
    cache = StreamingCache.for_model(model, num_kept=4, window=2**21, kv_dtype=kv_dtype)
    decoder, ids = StreamingDecoder(model, cache), ids.cuda()
    decoder.prefill(ids[:, :9])
    layers = cache.streams.layers
    buffers = [buffer for layer in layers for buffer in layer.buffers.values()]
    places = [buffer.data_ptr() for buffer in buffers]
    torch.cuda.reset_peak_memory_stats()
    memory = torch.cuda.memory_allocated()
    for t in range(9, 16):
        decoder(ids[:, t : t + 1])
    assert decoder.captured is not None
    assert [buffer.data_ptr() for layer in layers for buffer in layer.buffers.values()] == places
    assert torch.cuda.max_memory_allocated() - memory < max(buffer.nbytes for buffer in buffers)


@pytest.mark.gpu
@pytest.mark.parametrize("num_kept", [0, 1, 4])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma3_text"])
def test_flash_chunks_are_as_near_to_float64_as_single_tokens(family, num_kept):
    model = tiny.build(tiny.config(family, hidden_size=128), dtype=torch.float64)
    ids = tiny.random_ids(90)
    exact = oracle.stream_logits(model, ids[0], num_kept, 24)
    model, ids = model.to("cuda", torch.bfloat16), ids.cuda()
    errors = []
    for sizes in ([90], [7, 40, 1, 42], [1] * 90):
        cache = StreamingCache.for_model(model, num_kept=num_kept, window=24)
        with torch.no_grad():
            logits = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        errors.append((torch.cat(logits, dim=1)[0].cpu().double() - exact).norm())
    assert max(errors[:2]) <= 1.5 * errors[2]
