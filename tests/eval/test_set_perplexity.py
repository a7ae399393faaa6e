"""Perplexity by set against the loss of each window by hand."""

import json
import math
import shutil
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.cli.perplexity import perplexity
from sinklm.data import open_store, prepare_store
from sinklm.data.inputs import find_inputs
from sinklm.eval import set_perplexity
from sinklm.eval.loading import open_store_of
from sinklm.eval.set_perplexity import DEFAULT_LENGTH, ByteCounter, SetLoss, measure, results_table, sets_of, total

from .checkpoints import END_OF_TEXT, small_tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory, checkpoints):
    """Two sets, of which one has characters of several bytes."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [("Books", "The ship lay in the harbour. "), ("Näme", "Ein Märchen über Öl und Käse. ")]
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(60):
            name, text = rows[i % 2]
            file.write(json.dumps({"text": text * (1 + i % 5), "meta": {"pile_set_name": name}}) + "\n")
    shards = find_inputs([str(folder / "corpus.jsonl")]).shards
    options = {"tokenizer": str(checkpoints[0] / "tokenizer.json"), "validation_fraction": 0.5, "num_processes": 1}
    for name, changes in (("store", {}), ("mixed", {"split_sets": False}), ("whole", {"validation_fraction": 0.0})):
        prepare_store(shards, folder / name, **options | {"split_sets": True} | changes)
    return folder / "store"


@pytest.mark.parametrize("num_sinks", [0, 1, 2])
def test_every_token_but_the_first_is_scored_once_in_windows_after_the_sinks(checkpoints, store, num_sinks):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    room = model.config.max_position_embeddings - num_sinks
    for name, tokens in sets_of(open_store_of(store, tokenizer)).items():
        ids = torch.from_numpy(tokens.read(0, len(tokens))).long()
        assert len(ids) > 2 * room
        expected = 0.0
        for start in range(0, len(ids) - 1, room):
            end = min(start + room, len(ids) - 1)
            with torch.no_grad():
                log_probs = model(ids[None, start:end]).logits[0].log_softmax(-1)
            expected -= log_probs.gather(1, ids[start + 1 : end + 1, None]).double().sum().item()
        found = measure(model, tokenizer, name, tokens)
        assert found.nats == pytest.approx(expected, rel=1e-5)
        assert found.num_tokens == len(ids) - 1
        text = tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True)
        assert found.num_bytes == len(text.encode()) > (0 if name == "Books" else len(text))

        few = measure(model, tokenizer, name, tokens, max_tokens=room + 5)
        assert few.num_tokens == room + 5
        assert few.nats < found.nats


@pytest.mark.parametrize("num_prefix", [1, 2])
def test_tokens_that_the_tokenizer_puts_first_are_in_front_of_each_window(checkpoints, store, num_prefix):
    """As in an export: the model has no sinks, and its tokenizer begins each text with them."""
    model, tokenizer = load_model(checkpoints[0]), load_tokenizer(checkpoints[0])
    first = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([END_OF_TEXT] * num_prefix) + " $A", special_tokens=[(END_OF_TEXT, first)]
    )
    prefix = torch.full((num_prefix,), first)
    room = model.config.max_position_embeddings - num_prefix
    tokens = sets_of(open_store(store))["Books"]
    ids = torch.from_numpy(tokens.read(0, len(tokens))).long()
    losses = []
    for start in range(0, len(ids) - 1, room):
        targets = ids[start + 1 : start + 1 + room]
        with torch.no_grad():
            logits = model(torch.cat((prefix, ids[start : start + len(targets)]))[None]).logits[0, num_prefix:]
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    for max_tokens in (None, room, 2 * room + 3, len(ids) + 5):
        num_scored = min(max_tokens or len(ids), len(ids) - 1)
        steps = []
        found = measure(model, tokenizer, "Books", tokens, max_tokens=max_tokens, progress=steps.append)
        assert found.nats == pytest.approx(sum(losses[:num_scored]), rel=1e-5)
        assert found.num_tokens == sum(steps) == num_scored


@pytest.mark.parametrize("num_sinks", [0, 2])
def test_a_long_window_is_scored_in_several_passes(checkpoints, store, monkeypatch, num_sinks):
    model, tokenizer = load_model(checkpoints[num_sinks]), load_tokenizer(checkpoints[num_sinks])
    tokens = sets_of(open_store_of(store, tokenizer))["Books"]
    whole = measure(model, tokenizer, "Books", tokens)
    monkeypatch.setattr(set_perplexity, "LOGIT_BYTES", 4 * model.config.vocab_size * 17)
    monkeypatch.setattr(set_perplexity, "BATCH_TOKENS", 1)
    sizes = []
    model.register_forward_hook(lambda _, __, output: sizes.append(output.logits.shape[1]))
    assert measure(model, tokenizer, "Books", tokens).nats == pytest.approx(whole.nats, rel=1e-5)
    assert max(sizes) == 17


@given(cut=st.integers(0, 60), size=st.integers(1, 9))
@settings(max_examples=30)
def test_bytes_are_counted_wherever_a_text_is_cut(cut, size):
    """Characters of several bytes are several tokens of this tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token=END_OF_TEXT)
    documents = ["Öl und Käse 🧀", "日本語", "", "plain"]
    ids = torch.tensor(tokenizer(END_OF_TEXT.join(documents))["input_ids"])[cut:]
    counter = ByteCounter(tokenizer)
    for piece in ids.split(size):
        counter.read(piece)
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    assert counter.finish() == len(text.strip("\N{REPLACEMENT CHARACTER}").encode())
    assert cut or text == "".join(documents)


@pytest.mark.parametrize(("family", "length"), [("mpt", 64), ("bloom", DEFAULT_LENGTH)])
def test_a_model_without_positions_has_windows_of_its_own_or_a_default_length(checkpoints, store, family, length):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 500}
    layers = {"mpt": {"n_layers": 1, "max_seq_len": 64}, "bloom": {"n_layer": 1}}[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **layers)).eval()
    tokenizer = load_tokenizer(checkpoints[0])
    tokens = sets_of(open_store_of(store, tokenizer))["Books"]
    ids = torch.from_numpy(tokens.read(0, 66)).long()
    with torch.no_grad():
        logits = [model(part[None]).logits[0] for part in ids[:-1].split(length)]
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), ids[1:], reduction="sum").item()
    found = measure(model, tokenizer, "Books", tokens, max_tokens=65)
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_the_total_is_over_all_tokens():
    both = total([SetLoss("a", 10.0, 4, 8, 1.0), SetLoss("b", 2.0, 8, 4, 1.0)])
    assert (both.loss, both.num_tokens, both.num_bytes) == (1.0, 12, 12)
    assert both.bits_per_byte == pytest.approx(1 / math.log(2))
    assert both.is_total


def test_a_set_named_all_is_not_the_total():
    table = results_table([SetLoss("all", 10.0, 4, 8, 1.0), SetLoss("b", 2.0, 8, 4, 1.0)], "title")
    assert list(table.columns[0].cells) == ["all", "b", "all sets"]


def test_a_set_whose_tokens_have_no_bytes_has_no_bits_per_byte():
    rows = [SetLoss("special", 2.0, 2, 0, 1.0), SetLoss("b", 4.0, 8, 8, 1.0)]
    table = results_table(rows, "title")
    bits = [4 / math.log(2) / 8, 6 / math.log(2) / 8]
    assert list(table.columns[3].cells) == ["", *(f"{value:.4f}" for value in bits)]
    assert list(table.columns[4].cells) == ["2", "8", "10"]
    assert rows[0].as_json()["bits_per_byte"] is None


def test_the_largest_perplexity_fits_into_the_table():
    table = results_table([SetLoss("a", 8000.0, 10, 8, 1.0)], "title")
    assert list(table.columns[1].cells) == ["1.014e+304"]


def test_the_command_reports_each_set(tmp_path, checkpoints, store, capsys):
    perplexity(str(checkpoints[1]), store, max_tokens=40, output=tmp_path)
    report = json.loads((tmp_path / "perplexity.json").read_text())
    assert [row["set"] for row in report["results"]] == ["Books", "Näme", "all"]
    assert [row["is_total"] for row in report["results"]] == [False, False, True]
    assert report["results"][2]["num_tokens"] == 80
    assert report["length"] == load_model(checkpoints[1]).config.max_position_embeddings
    assert report["store_fingerprint"] == open_store(store).fingerprint
    assert f"{report['results'][1]['perplexity']:,.2f}" in capsys.readouterr().out


def test_a_damaged_store_is_not_scored(checkpoints, store, tmp_path):
    damaged = shutil.copytree(store, tmp_path / "damaged")
    path = next((damaged / "validation").glob("*.bin"))
    path.write_bytes(bytes(byte ^ 7 for byte in path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name}.*checksum"):
        perplexity(str(checkpoints[1]), damaged, output=tmp_path)


def test_sets_that_are_not_apart_are_refused(checkpoints, store):
    with pytest.raises(ValueError, match="corpus has no sets of documents: use a store of sinklm prepare"):
        sets_of(SimpleNamespace(path="corpus"))  # any other source of tokens
    with pytest.raises(ValueError, match="--split-sets"):
        sets_of(open_store(store.parent / "mixed"))
    with pytest.raises(
        ValueError, match=r"no split 'validation', only train; prepare another folder with a larger --v"
    ):
        sets_of(open_store(store.parent / "whole"))
