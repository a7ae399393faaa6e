"""StreamEval: questions, right answers, and results."""

import json
import re
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import Metaspace, Split
from transformers import PreTrainedTokenizerFast

from sinklm.cli.evaluate import stream_eval
from sinklm.eval.plots import stream_eval_figure
from sinklm.eval.stream_eval import (
    Answer,
    RecordTokens,
    StreamBatch,
    ask,
    check_distances,
    summarize,
    tokens_per_line,
)
from sinklm.eval.tasks.stream_eval.records import LARGEST_NUMBER, PREAMBLE, make_records
from sinklm.eval.zero_shot import evaluate, find_tasks, task_manager

from .checkpoints import small_model, small_tokenizer

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="<|endoftext|>")
TOKENS = RecordTokens(TOKENIZER)


def record_text(record: list[int], num_lines: int) -> str:
    return PREAMBLE + "".join(f"The REGISTER_CONTENT in line {i} is <{record[i]}>\n" for i in range(num_lines))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 9))
def test_records_are_a_function_of_seed_and_sample(num_samples, num_lines, seed):
    records = make_records(num_samples, num_lines, seed)
    assert [len(record) for record in records] == [num_lines] * num_samples
    assert all(1 <= number <= LARGEST_NUMBER for record in records for number in record)
    assert make_records(num_samples + 3, num_lines, seed)[:num_samples] == records
    assert num_lines < 5 or make_records(num_samples, num_lines, seed + 1) != records


@given(st.integers(0, 999), st.integers(0, 9))
def test_pieces_are_the_ids_of_the_whole_text(line, seed):
    records = make_records(2, 1000, seed)
    pieces = TOKENS.beginnings(records, 11), TOKENS.lines(records, 11, 20), *TOKENS.questions(records, line)
    for record, *parts in zip(records, *pieces, strict=True):
        ids = list(chain(*parts))
        whole = f"{record_text(record, 21)}Query: The REGISTER_CONTENT in line {line} is <{record[line]}>"
        assert TOKENIZER.decode(ids) == whole
        assert ids == TOKENIZER(whole)["input_ids"]


def test_a_tokenizer_that_drops_the_end_of_a_part_is_named():
    record, backend = make_records(1, 3, seed=0)[0], Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace()
    TOKENS.check_parts(record, 3)
    RecordTokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")).check_parts(record, 3)
    backend.normalizer = Strip()
    tokens = RecordTokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    with pytest.raises(ValueError, match="support this tokenizer: a text in parts has other tokens than the whole"):
        tokens.check_parts(record, 3)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        (" ", "it merges the end of a line with the next line"),
        (" |\n", "it has no token for the character >"),  # but <unk>
    ],
)
def test_a_tokenizer_that_cannot_write_the_answers_is_named(pieces, reason):
    backend = Tokenizer(WordLevel({"<unk>": 0, "\n": 1, " ": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(pieces), "isolated")
    tokens = RecordTokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    with pytest.raises(ValueError, match=f"^StreamEval does not support this tokenizer: {reason}$"):
        tokens.questions(make_records(2, 20, seed=0), 3)


@torch.no_grad()
def greedy(model, ids: list[int], num_tokens: int) -> list[int]:
    """Decode without any cache."""
    ids = list(ids)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-num_tokens:]


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_an_answer_is_right_if_greedy_decoding_without_a_cache_writes_it(num_sinks):
    """Rows of unequal length; asking twice shows that questions do not change the cache."""
    model = small_model(num_sinks, dtype=torch.float64, max_position_embeddings=2048)
    records = make_records(3, 20, seed=1)
    streams = StreamBatch(model, num_kept=1, window=900)
    texts = [TOKENS.beginnings([record], 3 + i)[0] for i, record in enumerate(records)]
    more = [TOKENS.lines([record], 3 + i, 5)[0] for i, record in enumerate(records)]
    streams.read(texts)
    streams.read(more)
    texts = [text + lines for text, lines in zip(texts, more, strict=True)]
    assert streams.num_read == [len(text) for text in texts]

    questions = [TOKENS.questions([record], line)[0][0] for record, line in zip(records, (0, 11, 2), strict=True)]
    written = [
        greedy(model, text + question, num_tokens)
        for text, question, num_tokens in zip(texts, questions, (4, 2, 3), strict=True)
    ]
    for _ in range(2):
        assert streams.answers(questions, written) == [True, True, True]
    for row, place in ((0, 0), (0, 3), (1, 1), (2, 2)):
        wrong = [list(answer) for answer in written]
        wrong[row][place] = (wrong[row][place] + 1) % 300
        assert streams.answers(questions, wrong) == [i != row for i in range(3)]
        assert streams.answers(2 * questions, wrong + written) == [i != row for i in range(6)]


class Clerk:
    """Replaces StreamBatch: looks the answer up in the text of the last tokens."""

    def __init__(self, model, num_kept: int, window: int, memory: object):
        self.window, self.ids, self.num_read = window, None, []

    def read(self, rows):
        self.ids = [old + row for old, row in zip(self.ids or [[]] * len(rows), rows, strict=True)]
        self.num_read = [len(row) for row in self.ids]

    def answers(self, questions, answers):
        streams = self.ids * (len(questions) // len(self.ids))
        return [self.is_right(*row) for row in zip(streams, questions, answers, strict=True)]

    def is_right(self, ids, question, answer):
        asked = re.fullmatch(r"Query: (The REGISTER_CONTENT in line \d+ is)", TOKENIZER.decode(question))[1]
        found = re.search(re.escape(asked) + r" <\d+>", TOKENIZER.decode(ids[-self.window :]))
        return found is not None and found[0] == asked + TOKENIZER.decode(answer)


@pytest.mark.parametrize("batch_size", [2, 5, 17])  # 17 rows are three distances of five streams
def test_answers_are_right_up_to_the_window(batch_size, monkeypatch):
    monkeypatch.setattr("sinklm.eval.stream_eval.StreamBatch", Clerk)
    records = make_records(5, 75, seed=0)
    reach = 32 * tokens_per_line(TOKENIZER, records[0])
    num_lines_read: list[int] = []
    answers = list(
        ask(
            None,
            TOKENIZER,
            records,
            num_kept=0,
            window=int(reach),
            distances=(0, 20, 30, 40),
            batch_size=batch_size,
            progress=num_lines_read.append,
        )
    )
    assert {(a.line, a.distance) for a in answers} == {
        (line, d) for line in range(10, 71, 10) for d in (0, 20, 30, 40) if d <= line
    }
    assert all(a.is_right == (a.distance <= 30) for a in answers)
    assert sum(num_lines_read) == 5 * 70
    for answer in answers:
        assert answer.num_tokens == len(TOKENIZER(record_text(records[answer.sample], answer.line + 1))["input_ids"])


@pytest.mark.parametrize("lines_per_question", [1, 4, 20, 29])
def test_fewer_questions_have_the_same_answers(lines_per_question, monkeypatch):
    monkeypatch.setattr("sinklm.eval.stream_eval.StreamBatch", Clerk)
    records = make_records(3, 30, seed=0)
    options = {"num_kept": 0, "window": int(4 * tokens_per_line(TOKENIZER, records[0])), "distances": (0, 3, 9)}
    found = list(ask(None, TOKENIZER, records, lines_per_question=lines_per_question, **options))
    every = {(a.sample, a.line, a.distance): a for a in ask(None, TOKENIZER, records, lines_per_question=1, **options)}
    assert {answer.is_right for answer in every.values()} == {True, False}
    assert sorted({answer.line for answer in found}) == list(range(lines_per_question, 30, lines_per_question))
    assert found == [every[answer.sample, answer.line, answer.distance] for answer in found]


def test_the_summary_counts():
    rights = {(10, 5): [True, False], (20, 5): [True, True], (20, 15): [False, True]}
    answers = [
        Answer(i, line, 100 * line + i, distance, is_right)
        for (line, distance), found in rights.items()
        for i, is_right in enumerate(found)
    ]
    summary = summarize(answers, 4, 60, seconds=1.0)
    assert summary["configuration"] == "4+60"
    assert summary["distances"] == [
        {"lines": 5, "accuracy": 0.75, "num_questions": 4},
        {"lines": 15, "accuracy": 0.5, "num_questions": 2},
    ]
    assert summary["places"] == [
        {"line": 10, "mean_num_tokens": 1000.5, "accuracy": {"5": 0.5}},
        {"line": 20, "mean_num_tokens": 2000.5, "accuracy": {"5": 1.0, "15": 0.5}},
    ]


def test_the_command_writes_table_json_and_picture(checkpoints, tmp_path, capsys):
    options = {"num_samples": 2, "num_lines": 31, "caches": "0+64,1+400", "distances": "20,0"}
    stream_eval(str(checkpoints[1]), **options, memory="2x16", batch_size=2, output=tmp_path)

    report = json.loads((tmp_path / "stream_eval.json").read_text())
    names = ["0+64", "0+64, memory 2x16", "1+400", "1+400, memory 2x16"]
    assert [r["configuration"] for r in report["results"]] == names
    assert [r["memory"] and r["memory"]["num_blocks"] for r in report["results"]] == [None, 2, None, 2]
    assert [(d["lines"], d["num_questions"]) for d in report["results"][0]["distances"]] == [(0, 6), (20, 4)]
    assert (tmp_path / "stream_eval.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "by distance in lines" in " ".join(shown.split())
    assert "1+400" in shown

    by_distance, by_place = stream_eval_figure(report).axes
    assert [line.get_label() for line in by_place.lines] == names
    assert by_distance.lines[0].get_xdata().tolist() == [0, 20]


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 15))
def test_a_distance_is_refused_if_and_only_if_no_question_has_it(distance, num_lines, lines_per_question):
    lines = range(lines_per_question, num_lines, lines_per_question)  # that a question follows
    can_be_asked = any(distance <= line for line in lines)
    with nullcontext() if can_be_asked else pytest.raises(ValueError, match="raise --num-lines"):
        check_distances([distance], num_lines, lines_per_question)


def test_distances_that_cannot_be_asked_are_refused(checkpoints, tmp_path):
    for distances, message in (
        ("20,50", r"contains 50, but the last question comes after line 40 of 50"),
        ("x", "'x'"),
    ):
        with pytest.raises(ValueError, match=f"--distances.*{message}"):
            stream_eval(str(checkpoints[1]), num_lines=50, distances=distances, output=tmp_path)
    with pytest.raises(ValueError, match=r"contains 30, but .* line 29 of 50: raise --num-lines above 58, lower"):
        stream_eval(str(checkpoints[1]), num_lines=50, lines_per_question=29, distances="30", output=tmp_path)
    with pytest.raises(ValueError, match=r"--num-lines 50 has no question, because .* after line 50: raise"):
        stream_eval(str(checkpoints[1]), num_lines=50, lines_per_question=50, output=tmp_path)
    with pytest.raises(ValueError, match="the cache 0\\+1 is smaller than the model's 2 sink"):
        stream_eval(str(checkpoints[2]), caches="0+1", output=tmp_path)


def test_the_task_of_lm_eval_asks_the_same_questions():
    """Without a streaming cache, as stock lm-eval asks: equal to a cache larger than the record."""
    model = small_model(1, max_position_embeddings=4096)
    manager = task_manager(["stream_eval"])
    entry = manager.task_index["stream_eval"]
    assert entry.yaml_path.parent.name == "stream_eval"
    records = make_records(20, 71, seed=0)
    results = evaluate(model, TOKENIZER, find_tasks(["stream_eval"]), limit=7, log_samples=True)
    samples = results["samples"]["stream_eval"]
    assert [sample["doc"]["line"] for sample in samples] == [20, 30, 40, 50, 60, 70, 20]
    for sample in samples[::3]:
        record, line = records[sample["doc"]["sample"]], sample["doc"]["line"]
        context, answer = sample["arguments"][0]
        assert context == record_text(record, line + 1) + f"Query: The REGISTER_CONTENT in line {line - 20} is"
        assert answer == f" <{record[line - 20]}>"
        (read,) = TOKENS.beginnings([record], line + 1)
        (question,), _ = TOKENS.questions([record], line - 20)
        ids = TOKENIZER(answer)["input_ids"]
        streams = StreamBatch(model, num_kept=1, window=4000)
        streams.read([read])
        assert streams.answers([question], [ids]) == [bool(sample["acc"])]


def test_stock_lm_eval_reads_the_task_without_sinklm(monkeypatch):
    monkeypatch.setitem(sys.modules, "sinklm", None)
    folder = Path(__file__).parents[2] / "eval" / "tasks"
    manager = TaskManager(include_path=folder, include_defaults=False, metadata={"distance": 60, "num_samples": 2})
    docs = manager.load(["stream_eval"])["tasks"]["stream_eval"].eval_docs
    assert [(doc["sample"], doc["line"]) for doc in docs] == [(0, 60), (0, 70), (1, 60), (1, 70)]
