"""Streaming question answering: exact match in one stream of questions (Xiao et al. 2024, Table 5).

The questions of ARC and their answers are one text without end. At each answer the model has read
all questions before it, with their right answers, through one cache. The baseline asks each
question alone. The paper's prompt and code were never released; this one shows the choices with
their labels, and the answer is a label. A text starts with an instruction::

    Answer each question with the label of the right choice.

    Question: Which of these is a mammal?
    A. a trout
    B. a whale
    Answer: B
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..models.cache_argument import CACHE
from ..models.checked import check_ids, checked_passes
from ..models.config import default_num_kept
from ..streaming import stream_logits
from ..streaming.families import num_embedded_positions
from ..streaming.layers import former_shape
from ..streaming.wrappers import decoder_of
from .losses import CHUNK, fills_memory, num_dense_inputs
from .perplexity import text_prefix

TASKS = ("arc_easy", "arc_challenge")
INSTRUCTION = "Answer each question with the label of the right choice.\n\n"
CACHE_SIZE = 1024  # the paper's
DENSE_LENGTHS = 2  # dense attention is asked up to this many trained lengths
ALONE_BATCH = 8
NUM_PLACES = 20  # points of a curve over the stream, at most
PLACE_QUESTIONS = 20  # of a point, at least

Progress = Callable[[int], None]  # called with the number of questions answered since the last call


@dataclass(frozen=True)
class Question:
    """A question with its choices as text up to ``Answer:``, the choices' labels and the answer."""

    text: str
    labels: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class QuestionTokens:
    """Ids of a question, of its answer, of the rest of the line, and of each label as an answer."""

    question: list[int]
    answer: list[int]
    end: list[int]
    labels: list[list[int]]


def questions_of(rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
    """Return the questions in the rows of ARC.

    Raises:
        ValueError: a row does not have the fields of ARC on the Hub.
    """
    questions = []
    for number, row in enumerate(rows):
        try:
            labels, texts, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
            text = row["question"]
            listed = "".join(f"{label}. {text}\n" for label, text in zip(labels, texts, strict=True))
            labels.index(answer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"row {number} of {source} is not a question of ARC ({error!r}): it needs question, choices.text, "
                "choices.label and answerKey, as allenai/ai2_arc on the Hub"
            ) from error
        questions.append(Question(f"Question: {text}\n{listed}Answer:", tuple(labels), answer))
    return questions


def fingerprint(questions: Sequence[Question]) -> str:
    """Return the sha256 of the texts of questions and answers."""
    return hashlib.sha256("".join(f"{q.text} {q.answer}\n\n" for q in questions).encode()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[QuestionTokens]:
    """Tokenize questions as parts of a running text.

    Raises:
        ValueError: the tokenizer merges the answer with the question.
    """
    line_end = _encode(tokenizer, "\n")

    def after_line(text: str) -> list[int]:  # where tokenizers do not prepend a space
        return _encode(tokenizer, "\n" + text)[len(line_end) :]

    def answer_after(question: str, ids: list[int], label: str) -> list[int]:
        whole = after_line(f"{question} {label}")
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise ValueError("streaming QA does not support this tokenizer: it merges the answer with the question")
        return whole[len(ids) :]

    tokenized = []
    for question in questions:
        ids = after_line(question.text)
        last = question.text.rpartition("\n")[2]  # labels follow the last line only, which is short
        short = after_line(last)
        answers = [answer_after(last, short, label) for label in question.labels]
        answer = answers[question.labels.index(question.answer)]
        tokenized.append(QuestionTokens(ids, answer, _encode(tokenizer, "\n\n"), answers))
    return tokenized


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Reply:
    """What greedy decoding writes at one answer. ``num_read`` is the tokens read before it."""

    num_read: int
    is_right: bool
    is_label: bool


def ask_in_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[QuestionTokens],
    *,
    num_kept: int | None,
    window: int | None,
    progress: Progress | None = None,
) -> list[Reply]:
    """Read all questions and answers as one text, and return the reply at each answer.

    A reply is right if every token of the answer is the most likely one after the tokens before it,
    which is what greedy decoding would write; so one pass over the text is enough.

    Args:
        num_kept: first tokens in the cache.
        window: recent tokens in the cache; None for both is dense attention. It stops after
            `DENSE_LENGTHS` trained lengths of text, after the last position embedding or when its
            cache fills the memory, and the replies with it.
    """
    ids = _beginning(tokenizer)
    places = []  # index of the first token of each answer
    for question in questions:
        places.append(len(ids) + len(question.question))
        ids += question.question + question.answer + question.end
    stream = torch.tensor(ids)
    check_ids(stream, model)
    if num_kept is None or window is None:
        passes = _dense_choices(model, stream, len(text_prefix(tokenizer)))
    else:
        logits = stream_logits(model, stream[None], num_kept=num_kept, window=window, chunk_size=CHUNK)
        passes = (chunk[0].argmax(-1).cpu() for chunk in logits)
    chosen: list[int] = []  # chosen[t] is the most likely token after ids[: t + 1]
    replies: list[Reply] = []
    with checked_passes(model):
        for chunk in passes:
            chosen += chunk.tolist()
            num_before = len(replies)
            for place, question in zip(places[num_before:], questions[num_before:], strict=True):
                last = place - 1 + len(question.answer)
                if last > len(chosen):
                    break
                replies.append(_reply(question, chosen[place - 1 : last], place))
            if progress and len(replies) > num_before:
                progress(len(replies) - num_before)
    return replies


@torch.inference_mode()
def ask_alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[QuestionTokens],
    progress: Progress | None = None,
) -> list[Reply]:
    """Return the reply to each question by itself, the one-shot baseline.

    Raises:
        ValueError: a question is longer than the position embeddings of the model.
    """
    prefix = _beginning(tokenizer)
    texts = [prefix + question.question + question.answer[:-1] for question in questions]
    longest = max(map(len, texts), default=0)
    if (num_positions := num_embedded_positions(model.config)) and longest > num_positions:
        raise ValueError(
            f"the longest question has {longest} tokens with the instruction, but the model has only "
            f"{num_positions} positions: remove one-shot from --methods"
        )
    replies: dict[int, Reply] = {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    for start in range(0, len(order), ALONE_BATCH):
        rows = order[start : start + ALONE_BATCH]
        longest = len(texts[rows[0]])
        ids = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in rows])  # causal: padding has no effect
        check_ids(ids, model)
        with checked_passes(model):
            chosen = model(ids.to(model.device), use_cache=False).logits.argmax(-1).tolist()
        for i, row in zip(rows, chosen, strict=True):
            end = len(texts[i])
            replies[i] = _reply(questions[i], row[end - len(questions[i].answer) : end], end)
        if progress:
            progress(len(rows))
    return [replies[i] for i in range(len(texts))]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return text_prefix(tokenizer) + _encode(tokenizer, INSTRUCTION)


def _reply(question: QuestionTokens, chosen: list[int], num_read: int) -> Reply:
    return Reply(num_read, chosen == question.answer, chosen in question.labels)


@torch.inference_mode()
def _dense_choices(model: PreTrainedModel, stream: torch.Tensor, num_prefix: int) -> Iterator[torch.Tensor]:
    last = num_dense_inputs(model, len(stream), DENSE_LENGTHS, num_prefix)
    cache = DynamicCache(config=model.config)
    for start in range(0, last, CHUNK):
        ids = stream[None, start : min(start + CHUNK, last)].to(model.device)
        yield model(ids, use_cache=True, **{CACHE: cache}).logits[0].argmax(-1).cpu()
        if fills_memory(cache, model.device):
            return


def default_caches(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return window attention and a stream with kept tokens, in a cache of 1024 tokens.

    The cache is smaller, half the trained length, for a model of less than 2048 positions. The kept
    tokens are the model's sinks, or the first four tokens. An export with full attention whose
    layers were all trained with one window has that window and its kept tokens.
    """
    if former := former_shape(decoder_of(model).config):
        return list(dict.fromkeys([(0, former.num_cached), (former.num_kept, former.window)]))
    num_positions = getattr(model.config, "max_position_embeddings", None) or 2 * CACHE_SIZE
    size = min(CACHE_SIZE, num_positions // 2)
    num_kept = default_num_kept(model.config)
    if size <= num_kept:
        raise ValueError("the model's trained length is too short for the default caches: set --caches")
    return [(0, size), (num_kept, size - num_kept)]


def summarize(replies: Sequence[Reply], task: str, method: str, cache: str, seconds: float) -> dict[str, Any]:
    """Return exact match with its standard error, and by place in the stream, ready for JSON.

    ``right`` has one character for each question, ``1`` if it was answered correctly.
    """
    num = len(replies)
    exact_match = sum(reply.is_right for reply in replies) / num
    size = max(PLACE_QUESTIONS, -(-num // NUM_PLACES))
    return {
        "task": task,
        "method": method,
        "configuration": cache,
        "num_questions": num,
        "exact_match": exact_match,
        "stderr": math.sqrt(exact_match * (1 - exact_match) / (num - 1)) if num > 1 else None,
        "label_rate": sum(reply.is_label for reply in replies) / num,
        "places": [_place(replies[i : i + size]) for i in range(0, num, size)],
        "right": "".join("01"[reply.is_right] for reply in replies),
        "seconds": round(seconds, 3),
    }


def _place(replies: Sequence[Reply]) -> dict[str, Any]:
    num = len(replies)
    return {
        "mean_num_tokens": sum(reply.num_read for reply in replies) / num,
        "num_questions": num,
        "exact_match": sum(reply.is_right for reply in replies) / num,
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[QuestionTokens],
    task: str,
    cache: tuple[int, int] | str,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Ask all questions of a task in one way and return `summarize` of the replies.

    None if dense attention cannot read the first question: see `ask_in_stream`.

    Args:
        cache: ``(num_kept, window)``, ``"one-shot"`` for each question alone, or ``"dense"``.
    """
    started = time.perf_counter()
    if cache == "one-shot":
        replies = ask_alone(model, tokenizer, questions, progress)
    else:
        kept, window = (None, None) if isinstance(cache, str) else cache
        replies = ask_in_stream(model, tokenizer, questions, num_kept=kept, window=window, progress=progress)
    if not replies:
        return None
    method = cache if isinstance(cache, str) else ("streaming" if cache[0] else "window")
    name = cache if isinstance(cache, str) else f"{cache[0]}+{cache[1]}"
    return summarize(replies, task, method, name, time.perf_counter() - started)


def results_table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """Return a table of exact match in percent, with a row for each way of asking."""
    table = Table(title=title)
    for header, justify in (("Task", "left"), ("Method", "left"), ("Cache", "left"), ("Questions", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for header in ("Exact match (%)", "± stderr", "Labels (%)"):
        table.add_column(header, justify="right")
    for row in results:
        stderr = "" if row["stderr"] is None else f"{100 * row['stderr']:.2f}"
        name = "" if row["method"] == row["configuration"] else row["configuration"]
        cells = (f"{100 * row['exact_match']:.2f}", stderr, f"{100 * row['label_rate']:.1f}")
        table.add_row(row["task"], row["method"], name, f"{row['num_questions']:,}", *cells)
    return table
