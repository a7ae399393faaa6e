import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data.tokenizer import (
    SAFE_CUT,
    cut_text,
    cuts_at_spaces,
    drops_text,
    eod_id,
    find_tokenizer_file,
    load_tokenizer_file,
    tokenizer_size,
    train_tokenizer,
    training_tokenizer,
    unknown_id,
)
from sinklm.special_tokens import drop_sinks, sink_names

from .corpora import random_text

TOKENIZER = train_tokenizer([random_text(random.Random(1), 5000)], vocab_size=400)


@given(st.text())
@example("<|endoftext|> and <|padding|>")
@example("Å Å A\u030a \ufb01 \r\n\t\x00  漢字🙂")
def test_a_trained_tokenizer_gives_every_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_a_trained_tokenizer_has_the_ids_of_gpt_neox() -> None:
    assert TOKENIZER.token_to_id("<|endoftext|>") == eod_id(TOKENIZER) == 0
    assert TOKENIZER.token_to_id("<|padding|>") == 1
    assert tokenizer_size(TOKENIZER) == TOKENIZER.get_vocab_size() == 400


def test_training_again_gives_the_same_tokenizer() -> None:
    again = train_tokenizer([random_text(random.Random(1), 5000)], vocab_size=400)
    assert again.to_str() == TOKENIZER.to_str()


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 258"):
        train_tokenizer(["text"], vocab_size=257)
    assert train_tokenizer(["text"], vocab_size=258).get_vocab_size() == 258


pieces = st.sampled_from(
    ["a", "bc ", " the sink", " ", "  ", "\n", "é", "e\u0301", "\u0301", "漢", "x y z", "1 2", "<|endoftext|>"]
)


@given(st.lists(pieces, max_size=60).map("".join), st.integers(1, 20))
def test_cutting_a_long_text_leaves_its_ids_as_they_are(text: str, length: int) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.NFC()  # GPT-NeoX has it
    tokenizer.add_tokens(["  ", "   "])  # and these
    assert cuts_at_spaces(tokenizer)
    cut = cut_text(text, length)
    assert "".join(cut) == text
    assert [id_ for piece in cut for id_ in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids
    # A piece ends at the first safe place after `length`, so it contains no other one there.
    assert all(SAFE_CUT.search(piece, length) is None for piece in cut)


def test_text_is_cut_only_for_tokenizers_that_allow_it() -> None:
    def changed(**changes: object) -> Tokenizer:
        tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
        for key, value in changes.items():
            setattr(tokenizer, key, value)
        return tokenizer

    assert cuts_at_spaces(changed())
    assert not cuts_at_spaces(changed(pre_tokenizer=pre_tokenizers.Metaspace()))
    assert not cuts_at_spaces(changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not cuts_at_spaces(changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))
    assert not cuts_at_spaces(changed(normalizer=normalizers.Lowercase()))
    reaching_over = changed()
    reaching_over.add_tokens(["in the"])
    assert not cuts_at_spaces(reaching_over)


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the sink token"
    assert load_tokenizer_file(tmp_path).encode(text).ids == TOKENIZER.encode(text).ids


@pytest.mark.parametrize("num_sinks", [1, 2, 11])
def test_sinks_of_a_tokenizer_are_left_out(tmp_path: Path, num_sinks: int) -> None:
    """Those of a model that sinklm has trained. Training adds its own, with the same ids."""
    pieces = [("<unk>", 0.0), *((letter, -1.0) for letter in "abc")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    for original in (TOKENIZER, unigram):
        tokenizer = Tokenizer.from_str(original.to_str())
        tokenizer.add_special_tokens(sink_names(num_sinks))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        found = training_tokenizer(tmp_path)
        assert found.tokenizer.get_vocab() == Tokenizer.from_buffer(found.content).get_vocab() == original.get_vocab()
        assert found.removed == [f"the token{'s' * (num_sinks > 1)} {' and '.join(sink_names(num_sinks))}"]


@pytest.mark.parametrize("added", [["<|sink|>", "<|new|>"], ["<|sink2|>"], ["<|sink|>", "<|sink3|>"]])
def test_tokens_that_are_not_the_last_ones_are_kept(tmp_path: Path, added: list[str]) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert training_tokenizer(tmp_path).removed == []
    state = json.loads(TOKENIZER.to_str())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] += 1
    sink = {"id": state["model"]["vocab"][last] - 1, "content": "<|sink|>"}
    state["added_tokens"].append({**state["added_tokens"][0], **sink})
    assert drop_sinks(state) == (state, [])


def test_a_tokenizer_is_found_by_file_folder_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such tokenizer file"):
        find_tokenizer_file(path)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: pass --tokenizer"):
        find_tokenizer_file(tmp_path)
    TOKENIZER.save(str(path))
    assert find_tokenizer_file(path) == find_tokenizer_file(tmp_path) == path


def test_a_folder_here_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"corpus has no tokenizer\.json"):
        find_tokenizer_file("corpus")


def test_without_the_hub_a_local_file_is_asked_for() -> None:
    with pytest.raises(OSError, match=r"EleutherAI/gpt-neox-20b.*pass --tokenizer with the path of a"):
        find_tokenizer_file("EleutherAI/gpt-neox-20b")


def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer_file(path)
    with pytest.raises(ValueError, match="no end-of-document token"):
        eod_id(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def test_the_command_trains_on_what_prepare_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(random_text(random.Random(2), 300))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": random_text(random.Random(3), 300)}) + "\n")
    output = tmp_path / "out" / "tokenizer.json"
    arguments = ["tokenizer", "train", str(tmp_path), "--vocab-size", "300", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "300 tokens from 2 documents" in result.output
    assert load_tokenizer_file(output).get_vocab_size() == 300


def test_the_command_says_when_the_text_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the sink the sink")
    arguments = ["tokenizer", "train", str(tmp_path), "--vocab-size", "5000", "--output", str(tmp_path / "t.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "of the 5,000 requested tokens" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the sink the sink")
    output = tmp_path / "t.json"
    (tmp_path / ".t.json.partial").symlink_to("/dev/full")
    arguments = ["tokenizer", "train", str(tmp_path / "a.txt"), "--vocab-size", "300", "--output", str(output)]
    with pytest.raises(OSError, match=rf"cannot write {output}: No space left on device"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_in_the_text_is_the_command_s_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    arguments = ["tokenizer", "train", str(tmp_path), "--vocab-size", "300", "--output", str(tmp_path / "t.json")]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "t.json").exists()


def bpe(alphabet: list[str], **options: Any) -> Tokenizer:
    vocab = {token: id_ for id_, token in enumerate(["<unk>", *alphabet])}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], **options))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
OF_UTF8 = [token for token in ALPHABET if token not in "ÀÁõö÷øùúûüýþÿ"]  # as in Pythia's tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "pre_tokenizer", "is_lost"),
    [
        (bpe(["a", "b"]), None, True),
        (bpe(["a", "b"]), pre_tokenizers.Whitespace(), True),
        (bpe(["a", "b"], unk_token="<unk>"), None, False),
        (bpe(["a", *BYTES], byte_fallback=True), None, False),
        (bpe(["a", *BYTES[:-60]], byte_fallback=True), None, True),
        (bpe(["a", *BYTES[:0xC0], *BYTES[0xC2:0xF5]], byte_fallback=True), None, False),
        (bpe(["a", *BYTES[:0xC0], *BYTES[0xC3:0xF5]], byte_fallback=True), None, True),
        (bpe(ALPHABET), pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (bpe(OF_UTF8), pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (bpe([token for token in OF_UTF8 if token != "ô"]), pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (bpe(["a", "b"]), pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), None, False),
        (Tokenizer(models.Unigram([("<unk>", 0.0)], 0)), None, False),
    ],
)
def test_it_is_known_whether_a_tokenizer_loses_text(
    tokenizer: Tokenizer, pre_tokenizer: Any, is_lost: bool, tmp_path: Path
) -> None:
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert drops_text(tokenizer) == is_lost
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert drops_text(load_tokenizer_file(tmp_path)) == is_lost
    if unknown_id(tokenizer) is None:
        text = "日¡ÿ\U0010ffff"
        assert (len(tokenizer.encode(text).ids) < len(text.encode())) == is_lost
