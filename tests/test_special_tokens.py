"""The store, the checkpoint and the export tokenize a text alike, without other tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from sinklm.checkpoints import load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.model_tokenizer import write_tokenizer
from sinklm.data import MegatronReader, find_inputs, prepare_store
from sinklm.data.tokenizer import load_tokenizer_file, training_tokenizer
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.special_tokens import PADDING_TOKENS, drop_template, padding_token, without_template
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config

from .data.processes import InProcessPool
from .eval.checkpoints import small_tokenizer

TEXT = "The old man went down to the sea, and <s> is in the text."
BOS, EOS = "<s>", "</s>"


def with_processor(kind: str) -> Tokenizer:
    """A tokenizer that adds tokens, as those of Llama, Mistral, Gemma, BERT and RoBERTa do."""
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (BOS, EOS)])
    ids = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
    template = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=ids)
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = {
        "template": template,
        "sequence": processors.Sequence([byte_level, template]),
        "nested": processors.Sequence([processors.Sequence([template]), byte_level]),
        "bert": processors.BertProcessing(ids[1], ids[0]),
        "roberta": processors.RobertaProcessing(ids[1], ids[0], trim_offsets=True, add_prefix_space=False),
    }[kind]
    assert tokenizer.encode(TEXT).ids != tokenizer.encode(TEXT, add_special_tokens=False).ids
    return tokenizer


@pytest.mark.parametrize("kind", ["template", "sequence", "nested", "bert", "roberta"])
@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_store_checkpoint_and_export_agree(
    tmp_path: Path, kind: str, num_sinks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    tokenizer = with_processor(kind)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text(TEXT)
    store = tmp_path / "store"
    found = find_inputs([str(tmp_path / "x.txt")]).shards
    manifest = prepare_store(found, store, tokenizer=tmp_path, validation_fraction=0.0)
    *ids, last = np.asarray(MegatronReader(store / "train/00000")[0]).tolist()
    assert last == manifest.tokenizer.eod_id

    sink = [f"model.sink.num_tokens={num_sinks}"] if num_sinks else ["model.sink.kind=none"]
    small = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
    plan = Plan(load_config("quickstart", [*sink, *small]), 1, manifest.tokenizer.size, manifest.tokenizer.eod_id)
    checkpoint = tmp_path / "checkpoint"
    SinkGPTNeoXForCausalLM(plan.model_config).save_pretrained(checkpoint)
    write_tokenizer(checkpoint, plan.model_config, store / "tokenizer.json")
    exported = export_model(checkpoint, tmp_path / "export")
    sinks = plan.model_config.sink_token_ids

    no_limits = Tokenizer.from_str(tokenizer.to_str())
    no_limits.no_truncation()
    no_limits.no_padding()
    assert ids == no_limits.encode(TEXT, add_special_tokens=False).ids
    for tokenize in (load_tokenizer_file(store).encode, Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode):
        assert tokenize(TEXT).ids == ids
    trained = load_tokenizer(checkpoint)
    assert trained(TEXT).input_ids == ids
    trained.add_tokens(["<new>"])  # the ids of the sinks are taken
    assert trained.convert_tokens_to_ids("<new>") == manifest.tokenizer.size + num_sinks
    assert (trained.padding_side, trained.model_input_names) == ("left", ["input_ids", "attention_mask"])
    assert Tokenizer.from_file(str(exported / "tokenizer.json")).encode(TEXT).ids == sinks + ids
    assert AutoTokenizer.from_pretrained(exported)(TEXT).input_ids == sinks + ids


@pytest.mark.parametrize("kind", ["template", "sequence"])
def test_the_export_of_an_older_checkpoint_has_no_template_either(tmp_path: Path, kind: str) -> None:
    tokenizer = with_processor(kind)
    size = tokenizer.get_vocab_size()
    plan = Plan(load_config("quickstart", ["model.hidden_size=64", "model.num_hidden_layers=1"]), 1, size)
    SinkGPTNeoXForCausalLM(plan.model_config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_tokenizer(tmp_path / "checkpoint", plan.model_config, tmp_path / "tokenizer.json")
    tokenizer.save(str(tmp_path / "checkpoint/tokenizer.json"))
    exported = export_model(tmp_path / "checkpoint", tmp_path / "export")
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(exported)(TEXT).input_ids == [*plan.model_config.sink_token_ids, *ids]


@pytest.mark.parametrize("padding", [None, *PADDING_TOKENS])
def test_padding_is_a_token_of_its_own_or_none(tmp_path: Path, padding: str | None) -> None:
    state = json.loads(small_tokenizer().to_str().replace(PADDING_TOKENS[0], padding or "<|other|>"))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    assert padding_token(tokenizer) == padding
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plan = Plan(load_config("quickstart", ["model.hidden_size=64", "model.num_hidden_layers=1"]), 1, 400)
    SinkGPTNeoXForCausalLM(plan.model_config).save_pretrained(tmp_path / "checkpoint")
    write_tokenizer(tmp_path / "checkpoint", plan.model_config, tmp_path / "tokenizer.json")
    exported = AutoTokenizer.from_pretrained(export_model(tmp_path / "checkpoint", tmp_path / "export"))
    for tokenizer in (load_tokenizer(tmp_path / "checkpoint"), exported):
        assert tokenizer.pad_token == padding
        assert tokenizer.eos_token == "<|endoftext|>"
        if padding is None:
            with pytest.raises(ValueError, match="does not have a padding token"):
                tokenizer(["a", "a b c"], padding=True)
        else:
            assert tokenizer(["", "a b c"], padding=True).input_ids[0][0] == tokenizer.pad_token_id != 0


def test_a_tokenizer_without_template_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.dumps(json.loads(small_tokenizer().to_str()), indent=1).encode()
    path.write_bytes(content)
    assert training_tokenizer(path)[1:] == (content, [])
    assert without_template(small_tokenizer()) is small_tokenizer()
    with_processor("template").save(str(path))
    assert training_tokenizer(path).removed == ["the template that adds <s>"]


def test_what_adds_no_token_is_kept() -> None:
    for kept in (None, {"type": "ByteLevel", "trim_offsets": False}, {"type": "Unknown"}):
        assert drop_template(kept) == (kept, [])
    plain = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    assert drop_template(plain) == (plain, [])
    assert drop_template({"type": "Sequence", "processors": [plain]}) == (
        {"type": "Sequence", "processors": [plain]},
        [],
    )
