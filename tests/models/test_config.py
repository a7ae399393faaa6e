import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig

from sinklm.models import SinkGPTNeoXConfig
from sinklm.models.config import sink_config, trained_windows
from sinklm.models.cost import flops_per_token, peak_flops


def test_a_config_has_the_kind_and_ids_of_its_sinks():
    config = SinkGPTNeoXConfig(vocab_size=50304, sink={"kind": "token", "num_tokens": 2})
    assert (config.sink_kind, config.num_sinks, config.sink_token_ids) == ("token", 2, [50277, 50278])
    plain = SinkGPTNeoXConfig()
    assert (plain.sink_kind, plain.num_sinks, plain.sink_token_ids) == ("none", 0, [])


def test_a_config_is_saved_and_loaded_unchanged(tmp_path):
    config = SinkGPTNeoXConfig(vocab_size=384, sink={"kind": "token", "num_tokens": 3, "first_token_id": 300})
    config.save_pretrained(tmp_path)
    assert SinkGPTNeoXConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_model_and_its_export_have_the_same_sinks():
    config = SinkGPTNeoXConfig(vocab_size=384, sink={"kind": "token", "num_tokens": 3, "first_token_id": 300})
    exported = GPTNeoXConfig(vocab_size=384, sink=config.sink)
    assert sink_config(config) is config
    assert sink_config(exported).sink_token_ids == [300, 301, 302]
    for other in (GPTNeoXConfig(), LlamaConfig(), LlamaConfig(sink={"kind": "token"})):
        assert sink_config(other).sink == {"kind": "none"}
    with pytest.raises(Exception, match="outside the vocabulary of 301"):
        sink_config(GPTNeoXConfig(vocab_size=301, sink=config.sink))


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ({"kind": "tokens"}, "sink.kind is 'tokens': choose one of none, token, zero, logit, kv_bias, gate, head_gate"),
        ({"kind": "token", "num_tokens": 0}, "sink.num_tokens is 0"),
        ({"kind": "token", "num_tokens": 1.5}, "sink.num_tokens is 1.5"),
        ({"kind": "token", "first_token_id": -1}, "sink.first_token_id is -1"),
        ({"kind": "token", "count": 1}, "unknown key sink.count"),
        ({"kind": "token", "first_token_id": 512}, "outside the vocabulary of 512"),
    ],
)
def test_invalid_sinks_are_an_error(sink, message):
    with pytest.raises(Exception, match=message):
        SinkGPTNeoXConfig(vocab_size=512, sink=sink)


@pytest.mark.parametrize("first", [0, 509])
def test_sinks_may_have_the_first_and_the_last_ids(first):
    sink = {"kind": "token", "num_tokens": 3, "first_token_id": first}
    assert SinkGPTNeoXConfig(vocab_size=512, sink=sink).sink_token_ids == [first, first + 1, first + 2]
    with pytest.raises(Exception, match="outside the vocabulary of 511"):
        SinkGPTNeoXConfig(vocab_size=511, sink=sink | {"first_token_id": 509})


def test_windows_are_saved_and_a_plain_model_has_none_of_their_fields(tmp_path):
    sink = {"kind": "token", "num_tokens": 2, "first_token_id": 300}
    settings = {"vocab_size": 384, "num_hidden_layers": 3, "sink": sink}
    config = SinkGPTNeoXConfig(**settings, layer_windows=[63, None, 63], window_range=[7, 63])
    assert (config.windows, config.num_kept, config.has_windows) == ([63, None, 63], 2, True)
    config.save_pretrained(tmp_path)
    loaded = SinkGPTNeoXConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    trained = {"layer_windows": [63, None, 63], "num_kept": 2, "window_range": [7, 63]}
    assert trained_windows(loaded) == trained
    assert loaded.to_dict().items() >= trained.items()
    plain = SinkGPTNeoXConfig(**settings, layer_windows=[None] * 3)
    assert (plain.layer_windows, plain.windows, plain.has_windows) == (None, [None] * 3, False)
    assert plain.to_json_string() == SinkGPTNeoXConfig(**settings).to_json_string()
    assert not trained.keys() & plain.to_dict().keys()
    assert trained_windows(plain) == {}
    assert plain.to_dict().keys() >= GPTNeoXConfig().to_dict().keys()  # also those that are None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_windows": [4]}, r"layer_windows is \[4\]: it must be a list with one entry for each of 2 layers"),
        ({"layer_windows": [4, 0]}, "layer_windows contains 0: a window is an integer of at least 1, or null"),
        ({"layer_windows": [4, 4], "num_kept": 1}, "num_kept is 1, but .* always keeps the sink tokens: set it to 2"),
        ({"layer_windows": [4, 4], "window_range": [5, 4]}, r"window_range is \[5, 4\]: it must be \[low, high\]"),
        ({"layer_windows": [4, 3], "window_range": [1, 4]}, "layer_windows contains 3, but the largest window of"),
        ({"layer_windows": [True, 8]}, "layer_windows contains True: a window is an integer of at least 1, or null"),
        ({"layer_windows": 5}, "layer_windows is 5: it must be a list with one entry for each layer"),
        ({"layer_windows": [4, 4], "num_kept": True}, "num_kept is True: it must be an integer of at least 0"),
        ({"layer_windows": [4, 4], "num_kept": -1}, "num_kept is -1: it must be an integer of at least 0"),
        ({"layer_windows": [4, 4], "window_range": [0, 4]}, r"window_range is \[0, 4\]: it must be \[low, high\]"),
        ({"layer_windows": [4, 4], "window_range": 5}, r"window_range is 5: it must be \[low, high\]"),
        ({"num_kept": 4}, "num_kept is 4, but no layer has a window: remove it"),
        ({"window_range": [1, 4]}, r"window_range is \[1, 4\], but no layer has a window"),
        (
            {"layer_windows": [4, 4], "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "windowed layers do not support rope_type 'dynamic'",
        ),
    ],
)
def test_inconsistent_windows_are_an_error(settings, message):
    sink = {"kind": "token", "num_tokens": 2, "first_token_id": 300}
    with pytest.raises(ValueError, match=message):
        SinkGPTNeoXConfig(vocab_size=384, num_hidden_layers=2, sink=sink, **settings)


@pytest.mark.parametrize(
    "record",
    [
        [63, 63],
        {},
        {"layer_window": [63, 63]},
        {"layer_windows": [63, 63], "hidden_size": 64},
        {"layer_windows": [63]},
        {"layer_windows": ["63", 63]},
        {"layer_windows": [63, 63], "num_kept": 1},  # fewer than the sinks
        {"layer_windows": [63, 63], "window_range": 63},
    ],
)
def test_a_damaged_record_of_trained_windows_is_an_error(record):
    sink = {"kind": "token", "num_tokens": 2, "first_token_id": 300}
    exported = GPTNeoXConfig(vocab_size=384, num_hidden_layers=2, sink=sink, trained_windows=record)
    with pytest.raises(
        ValueError, match=r"the key trained_windows of config\.json is damaged \(.*\): restore the file"
    ):
        trained_windows(exported)


def test_operations_of_windowed_layers():
    """`flops_per_token` of full attention is compared with torch's counter in tests/train."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}

    def operations(length, **windows):
        config = SinkGPTNeoXConfig(**sizes, **windows)
        return flops_per_token(config, length) - flops_per_token(SinkGPTNeoXConfig(**sizes), 0)

    for length in (100, 1000):  # flat in the length
        assert operations(length, layer_windows=[31, 31]) == 12 * 64 * 2 * 32
    assert operations(20, layer_windows=[31, 31], num_kept=4) == operations(20) == 12 * 64 * 2 * 20
    assert operations(100, layer_windows=[31, None], num_kept=4) == 12 * 64 * (36 + 100)
    drawn = operations(1000, layer_windows=[32, 32], window_range=[8, 32])
    assert drawn / (12 * 64 * 2) == pytest.approx((32 - 8) / math.log(4) + 1, rel=0.05)  # mean of log-uniform draws


@given(length=st.integers(1, 60), num_kept=st.integers(0, 5), low=st.integers(1, 40), more=st.integers(0, 40))
def test_operations_of_drawn_windows_are_the_mean_over_all_draws(length, num_kept, low, more):
    """Also where some or all of the windows reach the length, or more than that."""
    high = low + more
    drawn = {"layer_windows": [high, None], "window_range": [low, high]}
    config = SinkGPTNeoXConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_kept=num_kept, **drawn)
    chances = [math.log((window + 1) / window) for window in range(low, high + 1)]
    keys = [min(length, num_kept + window + 1) for window in range(low, high + 1)]
    mean = sum(chance * number for chance, number in zip(chances, keys, strict=True)) / sum(chances)
    without_keys = flops_per_token(config, 0)
    assert flops_per_token(config, length) - without_keys == pytest.approx(12 * 64 * (mean + length))
    of_one = min(length, num_kept + low + 1)
    assert flops_per_token(config, length, window=low) - without_keys == pytest.approx(12 * 64 * (of_one + length))


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),  # and not an L4 or L40
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),  # and not an H20
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_the_longest_name_in_its_own(monkeypatch, name, teraflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    expected = None if teraflops is None else teraflops * 1e12
    assert peak_flops(torch.device("cuda"), "bf16") == expected
    assert peak_flops(torch.device("cuda"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None
