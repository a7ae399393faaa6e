"""Perplexity by cache configuration: input, configurations, reports and plots."""

import json
import math
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.cli.evaluate import streaming
from sinklm.eval.loading import is_causal
from sinklm.eval.perplexity import (
    METHODS,
    MIN_BIN_TOKENS,
    Configuration,
    Result,
    TokenizedText,
    as_json,
    binned_losses,
    configurations,
    default_caches,
    default_methods,
    measure,
    position_bins,
    read_text_files,
    text_prefix,
    token_lengths,
)
from sinklm.eval.plots import streaming_figure
from sinklm.streaming import MemoryOptions, stream_losses

from .checkpoints import small_model, small_tokenizer, write_checkpoint

MEMORY = MemoryOptions(block_size=4, num_blocks=2, interval=4, representative_size=2)

WORDS = "In the morning the sea was calm, and the boats went out one after the other. "


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i}. {WORDS}" for i in range(20)), encoding="utf-8")
    return path


def test_texts_are_joined_by_a_blank_line_and_cut(checkpoints, tmp_path):
    tokenizer = load_tokenizer(checkpoints[1])
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    for file, text in zip(files, ("first text", "second text", "third text"), strict=True):
        file.write_text(text)

    stream = read_text_files(files[:2], tokenizer)
    assert tokenizer.decode(stream.ids) == "first text\n\nsecond text"
    assert stream.num_prefix == 0

    cut = read_text_files(files, tokenizer, num_tokens=len(stream.ids))
    assert torch.equal(cut.ids, stream.ids)
    assert cut.files == tuple(map(str, files[:2]))  # the third was not needed
    assert cut.sha256 == stream.sha256 != read_text_files(files, tokenizer).sha256


@pytest.mark.parametrize(
    ("template", "prefix"),
    [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("<s> </s> $A", [0, 1])],
)
@pytest.mark.parametrize("marks_the_first_word", [False, True])
def test_the_prefix_is_what_precedes_any_text(template, prefix, marks_the_first_word):
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "▁a": 3}, unk_token="a"))
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    if marks_the_first_word:
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
    assert text_prefix(PreTrainedTokenizerFast(tokenizer_object=raw)) == prefix


def test_a_text_may_begin_differently_after_the_prefix():
    def tokenizer(text, add_special_tokens=True):
        words = {"": [], "a": [8] if add_special_tokens else [7]}[text]
        return {"input_ids": [1, *words] if add_special_tokens else words}

    assert text_prefix(tokenizer) == [1]


def test_a_text_is_read_as_it_is_prepared(checkpoints, tmp_path):
    tokenizer, file = load_tokenizer(checkpoints[1]), tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbffirst line\r\nsecond line\r\n")  # of Windows, as many books of Project Gutenberg
    assert tokenizer.decode(read_text_files([file], tokenizer).ids) == "first line\r\nsecond line\r\n"
    file.write_bytes(b"zero\0byte")
    with pytest.raises(ValueError, match=r"a\.txt contains NUL bytes"):
        read_text_files([file], tokenizer)


def test_unreadable_texts_are_named(checkpoints, tmp_path):
    tokenizer = load_tokenizer(checkpoints[1])
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("few words")
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"short\.txt: \d+ tokens, but 100 are needed"):
        read_text_files([short], tokenizer, num_tokens=100)
    with pytest.raises(ValueError, match=r"binary\.txt is not UTF-8"):
        read_text_files([binary], tokenizer)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_text_files([tmp_path / "missing.txt"], tokenizer)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_gives_no_numbers_is_refused(book, method):
    model = small_model(1)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    stream = read_text_files([book], PreTrainedTokenizerFast(tokenizer_object=small_tokenizer()))
    with pytest.raises(ValueError, match="outputs are not finite: the checkpoint is damaged"):
        measure(model, stream, Configuration(method, int(method == "streaming"), 15))


def test_the_default_grid_is_that_of_table_3():
    model = small_model(1, max_position_embeddings=2048)
    assert default_caches(model) == [(0, 1024), (1, 1023), (2, 1022), (4, 1020)]


def test_methods_choose_among_the_caches():
    caches = [(0, 8), (1, 7), (4, 12)]
    chosen = configurations(["dense", "window", "streaming", "recompute"], caches, num_sinks=1)
    assert [str(c) for c in chosen] == ["dense", "0+8", "1+7", "4+12", "recompute 8", "recompute 16"]
    assert [str(c) for c in configurations(["window"], caches, num_sinks=1)] == ["0+8"]
    chosen = configurations(["dense", "streaming", "recompute"], [(1, 7)], num_sinks=1, memory=MEMORY)
    assert [str(c) for c in chosen] == [
        "dense",
        "1+7",
        "1+7, memory 2x4 interval=4 representative_size=2",
        "recompute 8",
    ]
    with pytest.raises(ValueError, match="dens"):
        configurations(["dens"], caches, num_sinks=1)
    with pytest.raises(ValueError, match="such as 0\\+1024"):
        configurations(["window"], [(4, 4)], num_sinks=1)
    with pytest.raises(ValueError, match="smaller than the model's 9 sink"):
        configurations(["window"], caches, num_sinks=9)


def test_by_default_methods_are_those_of_the_caches():
    assert default_methods([(0, 8), (4, 4)]) == ["dense", "window", "streaming"]
    assert default_methods([(4, 252), (4, 508)]) == ["dense", "streaming"]  # the grid of Table 6
    assert default_methods([(0, 8)]) == ["dense", "window"]


def test_dense_attention_ends_after_eight_trained_lengths(tmp_path, book, capsys):
    folder = write_checkpoint(tmp_path / "model", small_model(1, max_position_embeddings=32))
    streaming(str(folder), [book], tokens=400, caches="1+15", output=tmp_path)
    dense, stream = json.loads((tmp_path / "streaming.json").read_text())["results"]
    assert (dense["method"], dense["num_scored"]) == ("dense", 256)  # after the sink
    assert (stream["method"], stream["num_scored"]) == ("streaming", 400)
    assert "stopped after 256 tokens, 8 × the trained length" in " ".join(capsys.readouterr().out.split())


@given(st.one_of(st.integers(1, 3 * MIN_BIN_TOKENS), st.integers(1, 3_000_000)))
def test_bins_cover_the_text_and_grow_with_the_position(num_tokens):
    edges = position_bins(num_tokens)
    widths = [b - a for a, b in pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == num_tokens
    assert min(widths) >= min(MIN_BIN_TOKENS, num_tokens)
    assert all(b >= a for a, b in pairwise(widths[:-1]))


@given(st.one_of(st.integers(1, 2 * MIN_BIN_TOKENS), st.integers(1, 2000)), st.floats(0, 1))
def test_binned_losses_are_the_loss_spread_over_positions(num_tokens, share_unscored):
    losses = torch.rand(num_tokens, dtype=torch.float64)
    losses[: int(share_unscored * num_tokens)] = float("nan")
    edges = position_bins(num_tokens)
    weights = [int(losses[a:b].isfinite().sum()) for a, b in pairwise(edges)]
    binned = binned_losses(losses, edges)
    assert [mean is None for mean in binned] == [weight == 0 for weight in weights]
    total = sum(weight * mean for weight, mean in zip(weights, binned, strict=True) if mean is not None)
    assert total == pytest.approx(float(losses.nansum()), abs=1e-9)


def test_perplexity_is_over_the_scored_text_tokens():
    losses = torch.tensor([float("nan"), 1.0, 3.0], dtype=torch.float64)
    result = Result(Configuration("dense"), losses, seconds=1.0)
    assert result.num_scored == 2
    assert result.perplexity == pytest.approx(math.exp(2.0))


def test_the_first_token_can_be_left_out():
    losses = torch.tensor([6.0, 1.0, 3.0], dtype=torch.float64)
    tokenized = TokenizedText(torch.tensor([9, 5, 6, 7]), 1, "", (), torch.tensor([10, 2, 3]))
    whole = Result(Configuration("streaming", 1, 2), losses, seconds=1.0)
    rest = whole.after_first()
    assert (whole.num_scored, rest.num_scored) == (3, 2)
    assert (whole.num_bytes_scored(tokenized), rest.num_bytes_scored(tokenized)) == (15, 5)
    (row,) = as_json([whole], tokenized)["results"]
    assert row["loss"] == pytest.approx(10 / 3)
    assert row["bits_per_byte"] == pytest.approx(10 / math.log(2) / 15)
    after_first = {"num_scored": 2, "num_bytes_scored": 5, "loss": 2.0, "perplexity": math.exp(2.0)}
    assert row["after_first"] == pytest.approx(after_first | {"bits_per_byte": 4 / math.log(2) / 5})


@pytest.mark.parametrize("num_sinks", [1, 2])
def test_an_export_streams_as_its_checkpoint_does(checkpoints, tmp_path, book, num_sinks):
    """The tokenizer's sink tokens replace the model's and are not scored as text."""
    export = export_model(checkpoints[num_sinks], tmp_path / "export")
    model, plain = load_model(checkpoints[num_sinks]), load_model(export)
    stream = read_text_files([book], load_tokenizer(checkpoints[num_sinks]), 150)
    plain_stream = read_text_files([book], load_tokenizer(export), 150)
    assert plain_stream.num_prefix == num_sinks

    caches = [(0, 16), (num_sinks, 16 - num_sinks), (4, 12)]
    for configuration in configurations(["dense", "window", "streaming", "recompute"], caches, num_sinks):
        ours, theirs = (
            measure(*arguments, configuration, recompute_every=2)
            for arguments in ((model, stream), (plain, plain_stream))
        )
        assert configuration.method == "recompute" or ours.num_scored == 150
        torch.testing.assert_close(ours.losses, theirs.losses, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_losses_with_a_memory_are_those_of_its_cache(checkpoints, book):
    model, tokenized = load_model(checkpoints[1]), read_text_files([book], load_tokenizer(checkpoints[1]), 60)
    without, with_memory = configurations(["streaming"], [(1, 15)], num_sinks=1, memory=MEMORY)
    losses = measure(model, tokenized, with_memory).losses
    expected = torch.cat([*stream_losses(model, tokenized.ids[None], num_kept=1, window=15, memory=MEMORY)], dim=1)[0]
    torch.testing.assert_close(losses[1:].float(), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(losses, measure(model, tokenized, without).losses, atol=1e-3)


def test_the_command_writes_table_json_and_picture(checkpoints, tmp_path, book, capsys):
    streaming(
        str(checkpoints[1]),
        [book],
        tokens=300,
        caches="0+16,1+15",
        memory="2x8",
        methods="dense,window,streaming,recompute",
        recompute_every=4,
        output=tmp_path / "results",
    )

    report = json.loads((tmp_path / "results" / "streaming.json").read_text())
    caches = ["0+16", "0+16, memory 2x8", "1+15", "1+15, memory 2x8"]
    assert [r["configuration"] for r in report["results"]] == ["dense", *caches, "recompute 16"]
    assert [r["num_scored"] for r in report["results"][:5]] == [300] * 5
    assert report["results"][5]["num_scored"] == 18 + len(range(20, 300, 4))  # 17 and the first one; then every fourth
    assert report["text"]["num_tokens"] == 300
    for result in report["results"]:
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert (tmp_path / "results" / "streaming.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"{report['results'][1]['perplexity']:,.2f}" in shown
    assert "one in 4 tokens is scored" in shown


def test_the_picture_shows_every_configuration(checkpoints, book):
    model = load_model(checkpoints[1])
    stream = read_text_files([book], load_tokenizer(checkpoints[1]), 400)
    results = [measure(model, stream, c) for c in configurations(["dense", "window"], [(0, 16)], 1)]
    report = {"model": {"max_position_embeddings": 128}, **as_json(results, stream)}

    (axes,) = streaming_figure(report, "title").axes

    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) > 2}
    assert list(curves.values()) == [r["binned_losses"] for r in report["results"]]
    assert [label.split(":")[0] for label in curves] == ["dense", "0+16"]
    assert axes.get_xscale() == "log"
    assert {text.get_text().strip() for text in axes.texts} == {"cache full", "trained length"}


def test_what_was_measured_stays_when_a_later_configuration_fails(checkpoints, tmp_path, book, monkeypatch):
    def fails(*arguments, **keywords):
        raise RuntimeError("out of memory")

    streaming(str(checkpoints[1]), [book], tokens=100, caches="0+16", output=tmp_path)
    before = (tmp_path / "streaming.json").read_bytes()

    monkeypatch.setattr("sinklm.eval.perplexity.streaming_losses", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        streaming(str(checkpoints[1]), [book], tokens=100, caches="0+16", methods="dense,window", output=tmp_path)
    assert (tmp_path / "streaming.json").read_bytes() == before
    report = json.loads((tmp_path / "streaming.unfinished.json").read_text())
    assert [r["configuration"] for r in report["results"]] == ["dense"]

    monkeypatch.undo()
    streaming(str(checkpoints[1]), [book], tokens=100, caches="0+16", output=tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]


def test_a_folder_that_cannot_be_written_shows_before_the_work(checkpoints, tmp_path, book, monkeypatch):
    monkeypatch.setattr("sinklm.eval.perplexity.dense_losses", lambda *arguments: pytest.fail("worked in vain"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        streaming(str(checkpoints[1]), [book], tokens=100, methods="dense", output=tmp_path / "file")


def test_a_model_that_cannot_stream_is_refused_before_the_work(tmp_path, book, monkeypatch):
    monkeypatch.setattr("sinklm.eval.perplexity.dense_losses", lambda *arguments: pytest.fail("worked in vain"))
    folder = write_checkpoint(
        tmp_path / "gpt2", GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, n_positions=64))
    )
    with pytest.raises(ValueError, match="streaming does not support model type 'gpt2'"):
        streaming(str(folder), [book], tokens=100, output=tmp_path)
    with pytest.raises(ValueError, match="has only 64 positions for dense attention: lower --tokens"):
        streaming(str(folder), [book], tokens=100, methods="dense", output=tmp_path)
    with pytest.raises(ValueError, match="has only 64 positions, too few for re-computation with the cache 65: use a"):
        streaming(str(folder), [book], tokens=60, methods="recompute", caches="0+64,0+65", output=tmp_path)


def test_a_model_that_is_not_causal_is_refused(tmp_path, book):
    config = BertConfig(vocab_size=500, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    folder = write_checkpoint(tmp_path / "bert", BertLMHeadModel(config))
    with pytest.raises(ValueError, match="bert is not causal"):
        streaming(str(folder), [book], tokens=100, output=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_our_models_are_causal(num_sinks, dtype):
    assert is_causal(small_model(num_sinks, dtype))


@given(st.text(max_size=60).filter(lambda text: "\r" not in text))
@example("\x7f\x80\u07ff\u0800\uffff\U00010000")  # the last and first characters of each length
@example(" ")  # the offsets of its token are (0, 0)
def test_the_lengths_of_tokens_add_up_to_the_bytes_of_the_text(text):
    """Whatever characters it has: those of several bytes are split into several tokens."""
    encoding = small_tokenizer().encode(text, add_special_tokens=False)
    lengths = token_lengths(text, encoding.offsets)
    assert len(lengths) == len(encoding.ids)
    assert int(lengths.sum()) == len(text.encode())
    assert not len(lengths) or int(lengths.min()) >= 0


def test_bits_per_byte_are_the_loss_over_the_bytes_that_were_scored(checkpoints, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Das Öl fließt über die Straße. " * 12, encoding="utf-8")
    for num_sinks in (0, 1):
        tokenizer = load_tokenizer(checkpoints[num_sinks])
        stream = read_text_files([path], tokenizer, num_tokens=50)
        result = measure(load_model(checkpoints[num_sinks]), stream, Configuration("streaming", 2, 14))
        ids = stream.ids.tolist()
        scored = tokenizer.decode(ids[1 - num_sinks :])
        assert result.num_bytes_scored(stream) == len(scored.encode())
        nats = result.losses.nansum().item()
        assert result.bits_per_byte(stream) == pytest.approx(nats / math.log(2) / len(scored.encode()))
        (row,) = as_json([result], stream)["results"]
        assert row["bits_per_byte"] == result.bits_per_byte(stream)
