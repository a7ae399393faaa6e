"""Models whose layers are on several devices, or whose weights accelerate has offloaded."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from sinklm.streaming import Generator, MemoryOptions, StreamingCache

from . import tiny

FAMILIES = ["gpt_neox", "llama", "gemma3_text", "gptj", "mpt", "falcon:rw"]
SKIPPED = ["past_key_values", "cache"]


def for_model(model, kv_dtype=None, memory=None):
    window = 33 if kv_dtype else 9
    return StreamingCache.for_model(model, num_kept=2, window=window, kv_dtype=kv_dtype, memory=memory)


@torch.no_grad()
def run(model, cache, ids):
    """Chunks and single tokens, before and after the window has wrapped."""
    passes = [ids[:, :5], ids[:, 5:6], *ids[:, 6:25].split(1, dim=1), ids[:, 25:]]
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in passes], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_offloaded_weights_streams_and_saves(family, tmp_path):
    model, ids = tiny.build(tiny.config(family), dtype=torch.float32), tiny.random_ids(40)
    expected = run(model, for_model(model), ids)
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    cache = for_model(offloaded)
    torch.testing.assert_close(run(offloaded, cache, ids), expected, rtol=0, atol=0)
    cache.save(tmp_path / "cache")
    twin = StreamingCache.load(tmp_path / "cache", model)  # whether weights are offloaded makes no difference
    torch.testing.assert_close(run(model, twin, ids), run(offloaded, cache, ids), rtol=0, atol=0)
    other = copy.deepcopy(model)
    next(other.get_decoder().parameters()).data[3] += 1
    with pytest.raises(ValueError, match="the weights differ"):
        StreamingCache.load(tmp_path / "cache", cpu_offload(other, torch.device("cpu")))


def list_of_layers(model):
    (layers,) = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return layers


def second_layer_on_gpu_1(model):
    layers, head = list_of_layers(model), model.get_output_embeddings()
    parts = [*(child for child in model.get_decoder().children() if child is not layers), *layers, head]
    return {name: int(module is layers[1]) for name, module in model.named_modules() if any(module is p for p in parts)}


def on_two_devices(model):
    """Move the second layer, and what follows it, to the device meta, which has shapes only."""
    decoder = model.get_decoder()
    layers = list_of_layers(model)
    norms = [child for name, child in decoder.named_children() if "norm" in name or name == "ln_f"]
    for part in (layers[1], *norms, model.get_output_embeddings()):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(execution_device=torch.device("meta"), skip_keys=SKIPPED))
        for module in part.modules():
            module._hf_hook = part._hf_hook
    return model


@pytest.mark.parametrize(
    ("family", "kv_dtype"), [*((family, None) for family in FAMILIES), ("llama", "int8"), ("mpt", "int8")]
)
def test_the_buffers_of_a_layer_are_on_its_device(family, kv_dtype):
    """An operation on tensors of both devices would be an error. Numbers need two GPUs."""
    model = on_two_devices(tiny.build(tiny.config(family), dtype=torch.float32))
    cache = for_model(model, kv_dtype)
    assert run(model, cache, tiny.random_ids(40)).is_meta
    cache.reorder_cache(torch.zeros(1, dtype=torch.long))
    cache.streams.rebase()
    for twin in (cache, copy.deepcopy(cache)):
        devices = [{buffer.device.type for buffer in layer.buffers.values()} for layer in twin.streams.layers]
        assert devices == [{"cpu"}, {"meta"}]
    assert not Generator(model, cache).is_compiled


def test_weights_that_are_nowhere_are_an_error(tmp_path):
    model = tiny.build(tiny.config("gpt_neox"))
    for_model(model).save(tmp_path / "cache")
    model.gpt_neox.layers[1].to("meta")
    with pytest.raises(ValueError, match="weights on the device meta"):
        for_model(model)
    with pytest.raises(ValueError, match="weights on the device meta"):
        StreamingCache.load(tmp_path / "cache", model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"kv_dtype": kv_dtype}) for family in FAMILIES for kv_dtype in (None, "int8")),
        *((family, {"memory": MemoryOptions(4, 2, 4, 2)}) for family in ("gpt_neox", "llama")),
    ],
)
def test_two_gpus_give_the_numbers_of_one(family, options, tmp_path):
    model, ids = tiny.build(tiny.config(family), dtype=torch.float32).cuda(), tiny.random_ids(40).cuda()
    expected = run(model, for_model(model, **options), ids)
    model.save_pretrained(tmp_path / "model")
    spread = type(model).from_pretrained(tmp_path / "model", device_map=second_layer_on_gpu_1(model))
    assert {parameter.device.index for parameter in spread.parameters()} == {0, 1}
    cache = for_model(spread, **options)
    torch.testing.assert_close(run(spread, cache, ids), expected, rtol=0, atol=1e-6)
    cache.save(tmp_path / "cache")
    continued = run(spread, cache, ids)
    torch.testing.assert_close(run(spread, StreamingCache.load(tmp_path / "cache", spread), ids), continued)
