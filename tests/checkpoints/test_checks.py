"""What the checks of a model folder accept; `tests.bad_inputs` has what they refuse."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, LlamaConfig

from sinklm.checkpoints import checks

from ..streaming import small_families


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10_000},
        {"layer_norm_eps": 0.0},
        {"initializer_range": -0.1},
        {"dtype": None},
        {"dtype": {"text_config": "bfloat16"}},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1}},
        {"rope_scaling": {"type": "mrope"}},
        {"attn_implementation": "eager"},
        {"model_type": "mamba", "num_attention_heads": None},
        {"model_type": "qwen3", "num_attention_heads": 3, "head_dim": 8},
    ],
    ids=str,
)
def test_unusual_values_are_valid(values, tmp_path):
    settings = {"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings | values))
    assert checks.checked_config(str(tmp_path)).hidden_size == 16


def test_the_configuration_of_each_family_is_valid(tmp_path):
    for name in small_families.FAMILIES:
        if ":" not in name:
            small_families.config(name).save_pretrained(tmp_path)
            assert checks.checked_config(str(tmp_path)).model_type == name


@pytest.mark.parametrize("is_quantized", [False, True])
def test_integers_are_weights_of_a_quantized_model(is_quantized, tmp_path):
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 8}} if is_quantized else {}
    GPTNeoXConfig(num_hidden_layers=1, **quantization).save_pretrained(tmp_path)
    save_file({"a.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").touch()  # not the only form of the weights
    refused = pytest.raises(ValueError, match=r"a\.weight of type I8, .*no quantization_config: convert them")
    with nullcontext() if is_quantized else refused:
        checks.checked_config(str(tmp_path))


def test_files_of_weights_are_in_the_order_of_their_names(tmp_path):
    names = [f"{letter}.safetensors" for letter in "fdbeca"]
    for name in names:
        save_file({name: torch.zeros(3, ord(name[0]))}, tmp_path / name)
    (tmp_path / checks.INDEX).write_text(json.dumps({"weight_map": dict(zip(names, names, strict=True))}))
    assert checks.weight_files(tmp_path) == [tmp_path / name for name in sorted(names)]
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    checks.checked_config(str(tmp_path))
    assert checks.weight_shapes(tmp_path) == {name: (3, ord(name[0])) for name in names}
    (tmp_path / names[0]).write_bytes(bytes(20))
    with pytest.raises(ValueError, match=r"the weights in .* are damaged .*: copy them again"):
        checks.weight_shapes(tmp_path)


def test_missing_files_are_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no file named model\.safetensors"):
        checks.weight_shapes(tmp_path)
    with pytest.raises(OSError, match="find them in the cached files"):
        checks.checked_config("nobody/nothing")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"missing_keys": ["b", "a"]}, "lack a, which"),
        ({"mismatched_keys": [("b", [1], [2]), ("a", [3], [4])]}, r"have a of shape \(3,\), .* needs \(4,\)"),
        ({"unexpected_keys": ["b", "a"]}, "contain a, which"),
    ],
)
def test_the_first_of_several_wrong_weights_is_named(info, message):
    info = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []} | info
    with pytest.raises(ValueError, match=message):
        checks.check_names(GPTNeoXConfig(), info, "folder")


@pytest.mark.parametrize(("key", "is_extra"), [("layers.1.q", False), ("layers.2.q", True), ("rotary.x", False)])
def test_other_families_may_have_further_weights_but_not_layers(key, is_extra):
    info = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": [f"model.{key}"]}
    with pytest.raises(ValueError, match=rf"contain model\.{key}, which") if is_extra else nullcontext():
        checks.check_names(LlamaConfig(num_hidden_layers=2), info, "folder")


class PanicException(BaseException):
    """Named as those of libraries in Rust, which are no `Exception`."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [(Exception, ValueError), (PanicException, ValueError), (KeyboardInterrupt, KeyboardInterrupt)],
)
def test_errors_of_a_tokenizer_are_reported_but_no_interruption(error, expected, monkeypatch):
    def fail(text):
        raise error("oh")

    with pytest.raises(expected, match="oh"):
        checks.check_tokenizer(fail, "folder")
    monkeypatch.setattr(checks, "Tokenizer", SimpleNamespace(from_file=fail))
    with pytest.raises(expected, match="oh"):
        checks.read_tokenizer("tokenizer.json")
