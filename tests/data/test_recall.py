"""Generated records: each answer is right and unique, no phrasing has the words of StreamEval."""

import json
import math
import random
import re
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data import find_inputs
from sinklm.data.recall import (
    ASKING,
    COMPOSED_SHARE,
    INTRODUCTIONS,
    INVENTED_SHARE,
    KINDS_OF_KEYS,
    LARGEST_FIRST_KEY,
    LINKS,
    NAMES,
    OPENINGS,
    PLACES,
    PROMPTS,
    REPEATING_SHARE,
    SENTENCES_SHARE,
    SPELLED_SHARE,
    STATEMENTS,
    VERBS,
    Phrasing,
    make_record,
)
from sinklm.data.recall_words import COMMON_WORDS, NOUNS
from sinklm.data.tokenizer import load_tokenizer_file
from sinklm.eval.tasks.stream_eval.records import PREAMBLE, line_start, question_text

from ..eval.checkpoints import small_tokenizer

distances = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)


def occurrences(word: str, text: str) -> int:
    return len(re.findall(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), number=st.integers(0, 10**6), bounds=distances)
def test_every_answer_is_right_and_unique(seed, number, bounds):
    shortest, longest = bounds
    record = make_record(seed, number, shortest, longest)
    assert record.questions
    assert len(set(record.keys) | set(record.values)) == 2 * len(record.keys) == 2 * len(record.values)
    asked = [question.line for question in record.questions]
    assert len(set(asked)) == len(asked)
    for line, (key, value) in enumerate(zip(record.keys, record.values, strict=True)):
        # The value is in its line, and once more if it is asked for; no other line has it.
        assert occurrences(value, record.text) == 1 + (line in asked)
        stated = next(row for row in record.text.split("\n") if occurrences(value, row))
        assert key in stated
    for question in record.questions:
        assert shortest <= question.distance <= longest
        answer = record.text[question.start : question.end]
        assert occurrences(record.values[question.line], answer) == 1
        beginning = record.text[: question.start]
        last_value = record.values[question.last_line]
        assert occurrences(last_value, beginning)  # all lines up to the last are before the question …
        later = record.values[question.last_line + 1 :]
        assert not any(occurrences(value, beginning) for value in later)  # … and no later one
        assert record.keys[question.line] in beginning.rpartition("\n")[2] or beginning.endswith("A: ")


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), number=st.integers(0, 10**6), line=st.integers(0, 1000))
def test_no_phrasing_has_the_words_of_the_test(seed, number, line):
    text = make_record(seed, number, 0, 30).text
    forbidden = [PREAMBLE.strip(), "REGISTER", "in line", "Query", line_start(line), question_text(line)]
    assert not [phrase for phrase in forbidden if phrase.lower() in text.lower()]


def test_no_word_of_a_template_is_one_of_the_test():
    templates = [*NOUNS, *COMMON_WORDS, *PROMPTS, *INTRODUCTIONS, *LINKS, *NAMES, *OPENINGS, *PLACES, *VERBS]
    templates += [part for parts in (*STATEMENTS, *ASKING) for part in parts]
    assert not {"line", "lines", "register", "query"} & set(re.findall("[a-z]+", " ".join(templates).lower()))


def pattern_of(template: str) -> str:
    """Return the pattern of a part of a line with any words, in lower case."""
    pattern = re.escape(template.lower())
    for name in ("thing", "value", "place", "key"):
        pattern = pattern.replace(re.escape(f"{{{name}}}"), r"[\w-]+")
    return pattern


def test_all_phrasings_are_used_and_lengths_and_distances_differ():
    texts = [make_record(0, number, 0, 200) for number in range(1500)]
    joined = "\n".join(record.text for record in texts).lower()
    assert all(prompt.lower() in joined for prompt in PROMPTS)
    assert sum(noun in joined for noun in NOUNS) > 0.8 * len(NOUNS)
    for before, after in (*STATEMENTS, *ASKING):
        assert re.search(rf"{pattern_of(before)}.*{re.escape(after)}", joined), before
    for part in (*NAMES, *PLACES, *LINKS, *VERBS, *OPENINGS):
        assert re.search(pattern_of(part), joined), part
    lengths = sorted(len(record.keys) for record in texts)
    assert lengths[len(lengths) // 10] < 30
    assert lengths[-1] > 250
    found = [question.distance for record in texts for question in record.questions]
    assert min(found) == 0
    assert max(found) > 150


def test_shares_of_phrasings():
    """A question repeats the beginning of its line, or asks for it in other words."""
    drawn = [Phrasing.draw(random.Random(number)) for number in range(4000)]
    repeating = [each for each in drawn if each.question not in ASKING]
    assert all(each.question[0].endswith(each.statement[0]) for each in repeating)
    assert all(each.question[1] == each.statement[1] for each in repeating)
    words = [each.words[name] for each in drawn for name in ("thing", "value", "place")]
    invented = [word for word in words if word not in NOUNS]
    spelled = [word for word in invented if not re.fullmatch("([^aeiou][aeiou][^aeiou])+", word)]
    composed = [each.statement not in STATEMENTS for each in drawn]
    assert len(repeating) / len(drawn) == pytest.approx(REPEATING_SHARE, abs=0.03)
    assert len(invented) / len(words) == pytest.approx(INVENTED_SHARE, abs=0.03)
    assert len(spelled) / len(invented) == pytest.approx(SPELLED_SHARE, abs=0.05)  # few have syllables by chance
    assert sum(composed) / len(composed) == pytest.approx(COMPOSED_SHARE, abs=0.03)
    sentences = [each.introduction for each in drawn if each.introduction not in INTRODUCTIONS]
    assert len(sentences) / len(drawn) == pytest.approx(SENTENCES_SHARE, abs=0.03)
    assert len(set(sentences)) == len(sentences)
    assert all(text.endswith("\n") and text.strip() for text in sentences)
    assert {word.lower() for word in COMMON_WORDS} <= set(re.findall(r"\w+", " ".join(sentences).lower()))


def test_consecutive_keys_start_anywhere():
    keys = [make_record(0, number, 0, 20).keys for number in range(800)]
    first = [int(found[0]) for found in keys if found == [str(i) for i in range_from(found[0], len(found))]]
    assert len(first) / len(keys) == pytest.approx(KINDS_OF_KEYS.count("consecutive") / len(KINDS_OF_KEYS), abs=0.05)
    for low, high in pairwise((0, 1, 2, 10, 100, 1000, 10_000, LARGEST_FIRST_KEY + 1)):
        assert any(low <= number < high for number in first)


def range_from(first: str, count: int) -> range:
    return range(int(first), int(first) + count) if first.isdigit() else range(0)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 60), (7, 40)])
def test_distances_are_log_uniform(shortest, longest):
    """In each bin, the share of questions is that of a log-uniform number rounded down."""
    found = [q.distance for number in range(600) for q in make_record(0, number, shortest, longest).questions]
    edges = sorted({round((shortest + 1) * ((longest + 2) / (shortest + 1)) ** (i / 6)) - 1 for i in range(7)})
    whole = math.log((longest + 2) / (shortest + 1))
    for low, high in pairwise(edges):
        share = math.log((high + 1) / (low + 1)) / whole
        error = 4 * math.sqrt(share * (1 - share) / len(found))
        assert sum(low <= distance < high for distance in found) / len(found) == pytest.approx(share, abs=error)


def test_a_document_depends_on_seed_and_number_alone():
    assert make_record(3, 5, 0, 20) == make_record(3, 5, 0, 20)
    assert len({make_record(seed, number, 0, 20).text for seed in (0, 1) for number in (0, 1)}) == 4


def generate(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "generate", "recall", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_file_has_the_form_of_the_pile(tmp_path):
    said = generate("-o", tmp_path / "recall.jsonl.zst", "--num-documents", 7, "--seed", 2, "--distances", "1-9")
    num_questions = sum(len(make_record(2, number, 1, 9).questions) for number in range(7))
    assert f": 7 documents, {num_questions} questions" in said
    rows = zstandard.ZstdDecompressor().stream_reader((tmp_path / "recall.jsonl.zst").read_bytes()).read()
    found = [json.loads(line) for line in rows.decode().splitlines()]
    expected = [make_record(2, number, 1, 9).text for number in range(7)]
    assert found == [{"text": text, "meta": {"pile_set_name": "recall"}} for text in expected]
    (shard,) = find_inputs([str(tmp_path / "recall.jsonl.zst")]).shards
    assert [record.document().set_name for record in shard.read()] == ["recall"] * 7

    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    generate("-o", tmp_path / "x.jsonl", "--num-tokens", 3000, "--tokenizer", tmp_path / "tokenizer.json")
    texts = [json.loads(line)["text"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer_file(tmp_path)
    counts = [len(tokenizer.encode(text).ids) + 1 for text in texts]
    assert sum(counts) >= 3000 > sum(counts[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-documents", "1", "--distances", "9-1"], r"--distances 9-1: write the shortest and the longest"),
        (["--num-documents", "1", "--distances", "5"], r"--distances '5': write the shortest and the longest"),
        ([], "pass exactly one of --num-documents and --num-tokens"),
        (["--num-documents", "1", "--num-tokens", "1"], "pass exactly one of"),
        (["--num-tokens", "1"], "--num-tokens requires --tokenizer"),
        (["--num-documents", "1", "--tokenizer", "x"], "--tokenizer counts the tokens of --num-tokens: remove it"),
        (["--num-tokens", "1", "--tokenizer", "./none"], r"^tokenizer \./none: no such folder; check the path"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CliRunner().invoke(
            app, ["data", "generate", "recall", "-o", str(tmp_path / "x.jsonl"), *arguments], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text("mine")
    for name, error, message in (("x.jsonl", FileExistsError, "exists"), ("x.txt", ValueError, "must end in .jsonl")):
        with pytest.raises(error, match=message):
            CliRunner().invoke(
                app,
                ["data", "generate", "recall", "-o", str(tmp_path / name), "--num-documents", "1"],
                catch_exceptions=False,
            )
    assert (tmp_path / "x.jsonl").read_text() == "mine"
