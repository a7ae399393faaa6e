"""Models as people load them: with adapters or quantized weights. `test_decoding` compiles them."""

import copy

import pytest
import torch

from sinklm.streaming import StreamingCache

from . import tiny

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": True}


def build(family="llama", **overrides):
    return tiny.build(tiny.config(family, **overrides), dtype=torch.float32)


def for_model(model):
    return StreamingCache.for_model(model, num_kept=2, window=6)


@torch.no_grad()
def run(model, cache, ids):
    passes = [ids[:, :9], *ids[:, 9:14].split(1, dim=1), ids[:, 14:]]
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in passes], dim=1)


def check_generation(model, file):
    """Two turns of `generate`, another text, and a cache that was saved between the turns."""
    cache = for_model(model)
    text = model.generate(input_ids=tiny.random_ids(9), past_key_values=cache, **OPTIONS)
    cache.save(file)
    with pytest.raises(ValueError, match="does not begin with"):
        model.generate(input_ids=tiny.random_ids(30, seed=7), past_key_values=cache, **OPTIONS)
    full = torch.cat((text, tiny.random_ids(3, seed=2)), dim=1)
    again = model.generate(input_ids=full, past_key_values=cache, **OPTIONS)
    loaded = StreamingCache.load(file, model)
    assert model.generate(input_ids=full, past_key_values=loaded, **OPTIONS).tolist() == again.tolist()


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def test_a_lora_adapter_streams_like_the_merged_model(tmp_path):
    pytest.importorskip("peft")
    model, ids = with_lora(build()).eval(), tiny.random_ids(25)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(
        run(model, for_model(model), ids), run(merged, for_model(merged), ids), rtol=0, atol=1e-4
    )
    check_generation(model, tmp_path / "cache")
    with pytest.raises(ValueError, match="saved with another model"):
        StreamingCache.load(tmp_path / "cache", build())


def test_a_cache_belongs_to_the_adapters_in_use(tmp_path):
    """Another active adapter, scaling or none is another model, one that is not in use is not."""
    peft, model, file = pytest.importorskip("peft"), with_lora(build()).eval(), tmp_path / "cache"
    cache = for_model(model)
    run(model, cache, tiny.random_ids(16))
    cache.save(file)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4, task_type="CAUSAL_LM")
    model.add_adapter("other", settings)
    StreamingCache.load(file, model)
    with model.disable_adapter(), pytest.raises(ValueError, match="the weights differ"):
        StreamingCache.load(file, model)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="the weights differ"):
        StreamingCache.load(file, model)
    model.set_adapter("default")
    StreamingCache.load(file, model)
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    with pytest.raises(ValueError, match="the weights differ"):
        StreamingCache.load(file, model)


def test_torchao_8_bit_weights_stream_like_the_same_weights_in_full(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = build(), tiny.random_ids(25)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    full = build()
    for name, module in full.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = model.get_submodule(name).weight.dequantize()
    torch.testing.assert_close(run(model, for_model(model), ids), run(full, for_model(full), ids), rtol=0, atol=1e-3)
    check_generation(model, tmp_path / "cache")


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights_stream_chunk_by_chunk_like_at_once(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings, device_map="cpu")
    ids = tiny.random_ids(25)
    with torch.no_grad():
        at_once = model(ids, past_key_values=for_model(model)).logits
    error = (run(model, for_model(model), ids) - at_once).abs().max() / at_once.abs().max()
    assert error < (1e-4 if bits == 4 else 0.05)  # 8 bit activations are rounded by their largest of a pass
    check_generation(model, tmp_path / "cache")
