import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from sinklm.models import SinkGPTNeoXConfig
from sinklm.models.config import sink_config


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
