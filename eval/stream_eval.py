"""StreamEval: does a streaming model still know what it read a while ago? (Xiao et al. 2024, Figures 8 and 9, Table 7)

A stream is a record of numbered lines, each with a random number. After every tenth line the model is asked for the
number of a line some distance back. The paper's code for it was never released. Here each question is put to a copy of
the cache: neither it nor the answer enters the stream, so that any number of distances can be asked about at one place.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.cache_argument import CACHE
from ..streaming import StreamingCache
from .perplexity import text_prefix

PREAMBLE = "Below is a record of lines I want you to remember.\n"
LINES_PER_QUESTION = 10
LARGEST_NUMBER = 50_000  # of LongEval, after which the task is modelled
DISTANCES = (20, 40, 60, 80, 100, 150, 200)  # in lines: the first columns of Table 7


def make_records(num_samples: int, num_lines: int, seed: int) -> list[list[int]]:
    """The numbers of each sample's lines; a sample does not depend on how many others there are."""
    return [
        [generator.randint(1, LARGEST_NUMBER) for _ in range(num_lines)]
        for generator in (random.Random(f"{seed}:{sample}") for sample in range(num_samples))
    ]


def line_text(line: int, number: int) -> str:
    return f"{line_start(line)} <{number}>\n"


def line_start(line: int) -> str:
    return f"The REGISTER_CONTENT in line {line} is"


def question_text(line: int) -> str:
    return f"Query: {line_start(line)}"


class RecordTokens:
    """Records and questions as ids, as they stand in a running text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.line_end = self._encode("\n")

    def beginning(self, record: Sequence[int], num_lines: int) -> list[int]:
        """What precedes a text, the preamble and the first lines."""
        text = PREAMBLE + "".join(line_text(i, record[i]) for i in range(num_lines))
        return text_prefix(self.tokenizer) + self._encode(text)

    def lines(self, record: Sequence[int], first: int, last: int) -> list[int]:
        return self._after_line("".join(line_text(i, record[i]) for i in range(first, last + 1)))

    def question(self, record: Sequence[int], line: int) -> tuple[list[int], list[int]]:
        """Ids of the question and of the right answer, up to the token that closes the number."""
        question = self._after_line(question_text(line))
        with_answer = self._after_line(f"{question_text(line)} <{record[line]}>\n")
        if with_answer[: len(question)] != question:
            raise ValueError("this tokenizer joins the answer to the question: StreamEval cannot tell them apart")
        answer = with_answer[len(question) :]
        closing = next(i for i in range(len(answer)) if ">" in self.tokenizer.decode(answer[: i + 1]))
        return question, answer[: closing + 1]

    def _after_line(self, text: str) -> list[int]:
        """Some tokenizers put a space in front of all they are given; after a line's end there is none."""
        return self._encode("\n" + text)[len(self.line_end) :]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class StreamBatch:
    """A batch of streams in one cache. Rows of unequal length are padded on the left, which no stream sees."""

    def __init__(self, model: PreTrainedModel, num_kept: int, window: int):
        self.model = model
        self.cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
        self.num_read: list[int] = []

    def read(self, rows: list[list[int]]) -> None:
        self._forward(self.cache, rows, logits_to_keep=1)
        self.num_read = [n + len(row) for n, row in zip(self.num_read or [0] * len(rows), rows, strict=True)]

    def answers(self, questions: list[list[int]], answers: list[list[int]]) -> list[bool]:
        """Whether greedy decoding would write each answer after its question, asked of a copy of the cache.

        It would if every token of the answer is the likeliest after those before it: one pass tells.
        """
        longest = max(map(len, answers))
        rows = [question + answer[:-1] for question, answer in zip(questions, answers, strict=True)]
        logits = self._forward(copy.deepcopy(self.cache), rows, logits_to_keep=longest)
        likeliest = logits[:, -longest:].argmax(-1).tolist()
        return [tokens[-len(answer) :] == answer for tokens, answer in zip(likeliest, answers, strict=True)]

    @torch.inference_mode()
    def _forward(self, cache: StreamingCache, rows: list[list[int]], logits_to_keep: int) -> torch.Tensor:
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        is_token = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        past = is_token.new_ones(len(rows), cache.get_seq_length())
        return self.model(
            ids,
            attention_mask=torch.cat((past, is_token), dim=1),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
        ).logits


@dataclass(frozen=True)
class Answer:
    """One question asked of one sample: after which line and token, how many lines back, and whether it was right."""

    sample: int
    line: int
    num_tokens: int
    distance: int
    is_right: bool


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[list[int]],
    *,
    num_kept: int,
    window: int,
    distances: Sequence[int] = DISTANCES,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """Read all records and ask after every tenth line, from the first place on that lies far enough behind the start.

    Args:
        records: of equal length, by `make_records`.
        num_kept, window: of the cache, the model's own sinks being the first of the tokens kept.
        distances: in lines, from the last one read to the one asked for.
        batch_size: streams at a time; the answers do not depend on it, but for rounding.
        progress: is called with the number of lines read since the last call, over all streams.

    Raises:
        ValueError: if the records are too short to ask at one of the distances.
    """
    num_lines = len(records[0])
    check_distances(distances, num_lines)
    tokens = RecordTokens(tokenizer)
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        streams = StreamBatch(model, num_kept, window)
        for line in range(LINES_PER_QUESTION, num_lines, LINES_PER_QUESTION):
            first = line - LINES_PER_QUESTION + 1
            is_beginning = line == LINES_PER_QUESTION
            streams.read(
                [tokens.beginning(r, line + 1) if is_beginning else tokens.lines(r, first, line) for r in batch]
            )
            for distance in (d for d in distances if d <= line):
                questions, answers = zip(*(tokens.question(record, line - distance) for record in batch), strict=True)
                rights = streams.answers(list(questions), list(answers))
                for i, is_right in enumerate(rights):
                    yield Answer(start + i, line, streams.num_read[i], distance, is_right)
            if progress:
                progress(len(batch) * LINES_PER_QUESTION)


def check_distances(distances: Sequence[int], num_lines: int) -> None:
    """Raises ValueError for a distance that no question of a stream can have."""
    last = (num_lines - 1) // LINES_PER_QUESTION * LINES_PER_QUESTION
    for distance in distances:
        if distance < 0:
            raise ValueError(f"--distances has {distance}: it is how many lines back to ask about, at least 0")
        if distance > last:
            raise ValueError(
                f"--distances has {distance}, but the last question comes after line {last} of {num_lines}: "
                f"raise --num-lines above {distance} or leave it out"
            )


def summarize(answers: Sequence[Answer], num_kept: int, window: int, seconds: float) -> dict[str, Any]:
    """Accuracy by distance, and by place in the stream for each distance, ready for JSON."""
    places = []
    for line in sorted({answer.line for answer in answers}):
        there = [answer for answer in answers if answer.line == line]
        accuracy = {str(d): _accuracy(found) for d, found in _by_distance(there).items()}
        num_tokens = sum(answer.num_tokens for answer in there) / len(there)
        places.append({"line": line, "mean_num_tokens": num_tokens, "accuracy": accuracy})
    return {
        "configuration": f"{num_kept}+{window}",
        "num_kept": num_kept,
        "window": window,
        "distances": [
            {"lines": distance, "accuracy": _accuracy(found), "num_questions": len(found)}
            for distance, found in _by_distance(answers).items()
        ],
        "places": places,
        "seconds": round(seconds, 3),
    }


def _by_distance(answers: Sequence[Answer]) -> dict[int, list[Answer]]:
    return {d: [a for a in answers if a.distance == d] for d in sorted({a.distance for a in answers})}


def _accuracy(answers: Sequence[Answer]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)


def tokens_per_line(tokenizer: PreTrainedTokenizerBase, record: Sequence[int]) -> float:
    return len(RecordTokens(tokenizer).lines(record, 0, len(record) - 1)) / len(record)


def results_table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """Accuracy in percent: a row for each cache, a column for each distance."""
    table = Table(title=title)
    table.add_column("Cache")
    for column in results[0]["distances"]:
        table.add_column(f"{column['lines']} lines", justify="right")
    for result in results:
        table.add_row(result["configuration"], *(f"{100 * column['accuracy']:.1f}" for column in result["distances"]))
    return table
