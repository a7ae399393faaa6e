"""Streaming question answering: replies against decoding without a cache, and the report."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.cli.stream_qa import stream_qa
from sinklm.eval import decode_speed
from sinklm.eval import stream_qa as measurement
from sinklm.eval.plots import stream_qa_figure
from sinklm.eval.stream_qa import (
    INSTRUCTION,
    Reply,
    ask_alone,
    ask_in_stream,
    default_caches,
    questions_of,
    summarize,
    tokenize,
)

from ..models.tiny import as_export
from .checkpoints import small_model, small_tokenizer

ROWS = [
    {
        "question": f"What is {i} and {i}?",
        "choices": {
            "text": ["one", f"{2 * i}", "none of them"],
            "label": ["A", "B", "C"] if i % 2 else ["1", "2", "3"],
        },
        "answerKey": "B" if i % 2 else "3",
    }
    for i in range(12)
]
QUESTIONS = questions_of(ROWS, "the test")
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="<|endoftext|>")


def whole_text(num: int) -> str:
    return INSTRUCTION + "".join(f"{question.text} {question.answer}\n\n" for question in QUESTIONS[:num])


def test_the_stream_is_the_text_of_all_questions_and_answers():
    tokens = tokenize(TOKENIZER, QUESTIONS)
    ids = TOKENIZER(INSTRUCTION)["input_ids"]
    for question in tokens:
        ids = ids + question.question + question.answer + question.end
    assert TOKENIZER.decode(ids) == whole_text(12)
    assert whole_text(1).startswith(
        f"{INSTRUCTION}Question: What is 0 and 0?\n1. one\n2. 0\n3. none of them\nAnswer: 3\n\n"
    )
    assert [TOKENIZER.decode(label) for label in tokens[1].labels] == [" A", " B", " C"]


@torch.no_grad()
def greedy(model, text: str, num_tokens: int) -> list[int]:
    ids = TOKENIZER(text)["input_ids"]
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-num_tokens:]


@pytest.fixture(scope="module", params=[0, 1])
def model(request):
    return small_model(request.param, dtype=torch.float64, max_position_embeddings=2048)


def test_a_reply_is_what_greedy_decoding_without_a_cache_writes(model):
    """The answer of every other question is replaced by what the model writes, so it is right."""
    tokens = tokenize(TOKENIZER, QUESTIONS)
    for i in range(0, 12, 2):
        # a replaced answer is part of the context of later questions
        before = TOKENIZER(INSTRUCTION)["input_ids"]
        for question in tokens[:i]:
            before = before + question.question + question.answer + question.end
        with torch.no_grad():
            logits = model(torch.tensor([before + tokens[i].question]), use_cache=False).logits
        written = [int(logits[0, -1].argmax())]
        tokens[i] = measurement.QuestionTokens(tokens[i].question, written, tokens[i].end, [written])
    large = ask_in_stream(model, TOKENIZER, tokens, num_kept=2, window=1500)
    dense = ask_in_stream(model, TOKENIZER, tokens, num_kept=None, window=None)
    assert [reply.is_right for reply in large[::2]] == [reply.is_label for reply in large[::2]] == [True] * 6
    assert dense == large
    assert large[0].num_read == len(TOKENIZER(INSTRUCTION + QUESTIONS[0].text)["input_ids"])

    small = ask_in_stream(model, TOKENIZER, tokens, num_kept=0, window=8)
    assert [reply.num_read for reply in small] == [reply.num_read for reply in large]
    assert [reply.is_right for reply in small] != [reply.is_right for reply in large]


def test_each_question_alone_is_answered_as_without_the_others(model):
    tokens = tokenize(TOKENIZER, QUESTIONS)
    written = [greedy(model, INSTRUCTION + question.text, 2) for question in QUESTIONS]
    right = [
        measurement.QuestionTokens(t.question, w if i % 3 else [w[0], (w[1] + 1) % 300], t.end, [w])
        for i, (t, w) in enumerate(zip(tokens, written, strict=True))
    ]
    replies = ask_alone(model, TOKENIZER, right)
    assert [reply.is_right for reply in replies] == [bool(i % 3) for i in range(12)]


def test_dense_attention_stops_after_twice_the_trained_length():
    model = small_model(0, max_position_embeddings=64)
    tokens = tokenize(TOKENIZER, QUESTIONS)
    replies = ask_in_stream(model, TOKENIZER, tokens, num_kept=None, window=None)
    assert 0 < len(replies) < 12
    assert all(reply.num_read <= 128 for reply in replies)


def test_dense_attention_asks_an_export_as_many_questions_as_its_checkpoint(monkeypatch):
    tokens = tokenize(TOKENIZER, QUESTIONS)
    answered = len(TOKENIZER(whole_text(3)[:-2])["input_ids"])
    model = small_model(1, max_position_embeddings=answered // 2)  # one position too few with the sink
    ours = ask_in_stream(model, TOKENIZER, tokens, num_kept=None, window=None)
    monkeypatch.setattr(measurement, "text_prefix", lambda _: model.config.sink_token_ids)
    exported = ask_in_stream(as_export(model), TOKENIZER, tokens, num_kept=None, window=None)
    assert [reply.is_right for reply in exported] == [reply.is_right for reply in ours]
    assert len(ours) == 2


def test_models_with_position_embeddings_are_asked_within_them():
    config = GPT2Config(vocab_size=512, n_positions=96, n_embd=16, n_layer=1, n_head=2)
    model, tokens = GPT2LMHeadModel(config).eval(), tokenize(TOKENIZER, QUESTIONS)
    replies = ask_in_stream(model, TOKENIZER, tokens, num_kept=None, window=None)
    assert 0 < len(replies) < 12
    assert len(ask_alone(model, TOKENIZER, tokens)) == 12
    short = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="only 32 positions: remove one-shot"):
        ask_alone(short, TOKENIZER, tokens)


def test_the_default_caches_are_of_equal_size_and_keep_the_sinks():
    assert default_caches(small_model(0, max_position_embeddings=4096)) == [(0, 1024), (4, 1020)]
    assert default_caches(small_model(2, max_position_embeddings=256)) == [(0, 128), (2, 126)]
    exported = as_export(small_model(2, max_position_embeddings=256))
    assert default_caches(exported) == [(0, 128), (2, 126)]
    assert decode_speed.default_caches(exported)[0] == (2, 254)
    with pytest.raises(ValueError, match="set --caches"):
        default_caches(small_model(0, max_position_embeddings=8))


def test_the_summary_counts_right_answers_and_labels_by_place():
    replies = [Reply(10 * i, is_right=i % 4 == 0, is_label=i % 2 == 0) for i in range(40)]
    row = summarize(replies, "arc_easy", "window", "0+8", 1.0)
    assert (row["exact_match"], row["label_rate"], row["num_questions"]) == (0.25, 0.5, 40)
    assert row["stderr"] == pytest.approx((0.25 * 0.75 / 39) ** 0.5)
    assert row["right"] == "1000" * 10
    assert sum(place["num_questions"] for place in row["places"]) == 40
    assert [place["mean_num_tokens"] for place in row["places"]] == [95.0, 295.0]


@pytest.mark.parametrize(
    "change",
    [
        {"choices": ["a", "b"]},
        {"answerKey": "Z"},
        {"choices": {"text": ["a"], "label": ["A", "B"]}},
        {"question": None},
    ],
)
def test_rows_that_are_not_of_arc_are_named(change):
    row = {key: value for key, value in (ROWS[1] | change).items() if value is not None}
    with pytest.raises(ValueError, match="row 1 of my file is not a question of ARC"):
        questions_of([ROWS[0], row], "my file")


def test_the_command_writes_results_and_a_picture(tmp_path, checkpoints, capsys):
    for task in ("arc_easy", "arc_challenge"):
        (tmp_path / f"{task}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    stream_qa(str(checkpoints[1]), data_dir=tmp_path, caches="0+32,1+31", limit=9, output=tmp_path / "out")

    report = json.loads((tmp_path / "out" / "stream_qa.json").read_text())
    assert [(row["task"], row["configuration"]) for row in report["results"][:4]] == [
        ("arc_easy", name) for name in ("one-shot", "dense", "0+32", "1+31")
    ]
    assert [row["method"] for row in report["results"][4:]] == ["one-shot", "dense", "window", "streaming"]
    assert report["results"][0]["num_questions"] == 9
    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    replies = ask_in_stream(model, tokenizer, tokenize(tokenizer, QUESTIONS[:9]), num_kept=1, window=31)
    assert report["results"][3]["right"] == "".join("01"[reply.is_right] for reply in replies)
    assert (tmp_path / "out" / "stream_qa.png").stat().st_size > 10_000
    assert len(stream_qa_figure(report).axes) == 2
    stopped = f"arc_easy: dense attention stopped after {report['results'][1]['num_questions']} questions."
    assert stopped in capsys.readouterr().out
    stream_qa(str(checkpoints[1]), data_dir=tmp_path, methods="dense", limit=9, output=tmp_path / "out")
    assert stopped in capsys.readouterr().out
    with pytest.raises(ValueError, match="--tasks contains 'piqa'"):
        stream_qa(str(checkpoints[1]), data_dir=tmp_path, tasks="piqa")
    with pytest.raises(ValueError, match="--methods contains 'window'"):
        stream_qa(str(checkpoints[1]), data_dir=tmp_path, methods="window")


def test_a_first_question_longer_than_dense_attention_reads_leaves_the_caches(tmp_path, checkpoints, capfd):
    rows = [ROWS[0] | {"question": "What is the number? " * 200}, *ROWS[1:3]]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data_dir": tmp_path, "tasks": "arc_easy", "caches": "0+32", "output": tmp_path / "out", "quiet": True}

    stream_qa(str(checkpoints[0]), methods="dense,stream", **options)

    report = json.loads((tmp_path / "out" / "stream_qa.json").read_text())
    assert [(row["method"], row["num_questions"]) for row in report["results"]] == [("window", 3)]
    shown = capfd.readouterr().err
    assert "arc_easy: dense attention answers no question" in shown
    assert len(shown.split()) == len(shown.strip().splitlines()[0].split())  # no bars of datasets with --quiet
    with pytest.raises(ValueError, match="use --methods stream"):
        stream_qa(str(checkpoints[0]), methods="dense", **options | {"caches": None})
