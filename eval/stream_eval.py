"""StreamEval: recall of earlier lines in a stream (Xiao et al. 2024, Figures 8 and 9, Table 7).

A stream is a record of numbered lines, each with a random number. By default after every tenth
line, the model is queried for the number of a line some distance back. The paper's code for it was
never released. Here each question uses a copy of the cache, so neither question nor answer enters
the stream, and several distances can be queried at one place.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import ceil
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.cache_argument import CACHE
from ..models.checked import checked_passes
from ..streaming import MemoryOptions, StreamingCache
from .perplexity import cache_name, text_prefix
from .tasks.stream_eval.records import LINES_PER_QUESTION, line_text, question_text, record_text

DISTANCES = (20, 40, 60, 80, 100, 150, 200)  # in lines: the first columns of Table 7


class RecordTokens:
    """Tokenizes records and questions as parts of a running text, all streams at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.closing: dict[int, bool] = {}  # whether a token has the character >
        (self.line_end,) = self._encode(["\n"])

    def beginnings(self, records: Sequence[Sequence[int]], num_lines: int) -> list[list[int]]:
        """Return the tokenizer's prefix, the preamble and the first lines of each record."""
        prefix = text_prefix(self.tokenizer)
        return [prefix + ids for ids in self._encode([record_text(record, num_lines) for record in records])]

    def lines(self, records: Sequence[Sequence[int]], first: int, last: int) -> list[list[int]]:
        """Return the ids of the lines ``first`` to ``last`` of each record."""
        numbers = range(first, last + 1)
        return self._after_line(["".join(line_text(i, record[i]) for i in numbers) for record in records])

    def questions(self, records: Sequence[Sequence[int]], line: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of each record's question and right answer, up to the token with ``>``."""
        (question,) = self._after_line([question_text(line)])
        answers = []
        for ids in self._after_line([f"{question_text(line)} <{record[line]}>\n" for record in records]):
            if ids[: len(question)] != question:
                raise ValueError("StreamEval does not support this tokenizer: it merges the answer with the question")
            answers.append(self._until_closed(ids[len(question) :]))
        return [question] * len(records), answers

    def check_parts(self, record: Sequence[int], num_lines: int) -> None:
        """Raise a ValueError if two parts of a record have other tokens than both at once."""
        (first,), (whole,) = self.beginnings([record], 1), self.beginnings([record], num_lines)
        if first + self.lines([record], 1, num_lines - 1)[0] != whole:
            raise ValueError(
                "StreamEval does not support this tokenizer: a text in parts has other tokens than the whole text"
            )

    def _until_closed(self, answer: list[int]) -> list[int]:
        """Return an answer up to the first token with ``>``."""
        for i, token in enumerate(answer):
            if self._closes(token):
                return answer[: i + 1]
        raise ValueError("StreamEval does not support this tokenizer: it has no token for the character >")

    def _closes(self, token: int) -> bool:
        if token not in self.closing:
            self.closing[token] = ">" in self.tokenizer.decode([token], skip_special_tokens=True)  # not <unk>
        return self.closing[token]

    def _after_line(self, texts: list[str]) -> list[list[int]]:
        """Encode texts after a line's end, where tokenizers do not prepend a space."""
        encoded, num_before = self._encode(["\n" + text for text in texts]), len(self.line_end)
        if any(ids[:num_before] != self.line_end for ids in encoded):
            raise ValueError(
                "StreamEval does not support this tokenizer: it merges the end of a line with the next line"
            )
        return [ids[num_before:] for ids in encoded]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


class StreamBatch:
    """A batch of streams in one cache. Shorter rows are padded on the left and masked."""

    def __init__(self, model: PreTrainedModel, num_kept: int, window: int, memory: MemoryOptions | None = None):
        self.model = model
        self.cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, memory=memory)
        self.num_read: list[int] = []

    def read(self, rows: list[list[int]]) -> None:
        self._forward(self.cache, rows, logits_to_keep=1)
        self.num_read = [n + len(row) for n, row in zip(self.num_read or [0] * len(rows), rows, strict=True)]

    def answers(self, questions: list[list[int]], answers: list[list[int]]) -> list[bool]:
        """Whether greedy decoding from a copy of the cache produces each answer.

        This holds if every token of the answer is the most likely one after the tokens before it,
        so a single pass is enough. There can be several questions for each stream: first one for
        all streams, then the next one for all of them.
        """
        longest = max(map(len, answers))
        rows = [question + answer[:-1] for question, answer in zip(questions, answers, strict=True)]
        cache = copy.deepcopy(self.cache)
        if len(rows) > len(self.num_read):
            streams = torch.arange(len(self.num_read))
            cache.batch_select_indices(streams.repeat(len(rows) // len(streams)))
        logits = self._forward(cache, rows, logits_to_keep=longest)
        likeliest = logits[:, -longest:].argmax(-1).tolist()
        return [tokens[-len(answer) :] == answer for tokens, answer in zip(likeliest, answers, strict=True)]

    @torch.inference_mode()
    def _forward(self, cache: StreamingCache, rows: list[list[int]], logits_to_keep: int) -> torch.Tensor:
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        is_token = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        past = is_token.new_ones(len(rows), cache.get_seq_length())
        with checked_passes(self.model):
            return self.model(
                ids,
                attention_mask=torch.cat((past, is_token), dim=1),
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{CACHE: cache},
            ).logits


@dataclass(frozen=True)
class Answer:
    """The answer to one question: its sample, place, distance in lines, and correctness."""

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
    memory: MemoryOptions | None = None,
    distances: Sequence[int] = DISTANCES,
    lines_per_question: int = LINES_PER_QUESTION,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """Read all records and ask at regular places, at each distance that fits.

    Args:
        records: records of equal length, from `make_records`.
        num_kept: first tokens that the cache keeps, with the model's own sink tokens.
        window: recent tokens in the cache.
        memory: of the cache. With a memory, a batch has one stream.
        distances: distances in lines, from the last line read to the queried line.
        lines_per_question: lines from one place to the next, which are read in one pass.
        batch_size: rows of a pass: streams, or several questions for each of fewer streams. It does
            not change the answers except for rounding.
        progress: called with the number of lines read since the last call, over all streams.

    Raises:
        ValueError: the records are too short for one of the distances.
    """
    num_lines = len(records[0])
    check_distances(distances, num_lines, lines_per_question)
    tokens = RecordTokens(tokenizer)
    tokens.check_parts(records[0], lines_per_question + 1)
    batch_size = batch_size if memory is None else 1  # rows of different lengths would need padding
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        streams, num_distances = StreamBatch(model, num_kept, window, memory), batch_size // len(batch)
        for line in read_lines(streams, tokens, batch, lines_per_question):
            fitting = [distance for distance in distances if distance <= line]
            for some in (fitting[i : i + num_distances] for i in range(0, len(fitting), num_distances)):
                asked = [tokens.questions(batch, line - distance) for distance in some]
                questions, answers = (list(chain.from_iterable(rows)) for rows in zip(*asked, strict=True))
                for i, is_right in enumerate(streams.answers(questions, answers)):
                    distance, stream = some[i // len(batch)], i % len(batch)
                    yield Answer(start + stream, line, streams.num_read[stream], distance, is_right)
            if progress:
                progress(len(batch) * lines_per_question)


def read_lines(
    streams: StreamBatch,
    tokens: RecordTokens,
    batch: Sequence[Sequence[int]],
    lines_per_question: int = LINES_PER_QUESTION,
) -> Iterator[int]:
    """Read a batch of records, and yield the number of the last line where a question follows."""
    for line in range(lines_per_question, len(batch[0]), lines_per_question):
        is_beginning = line == lines_per_question
        first = line - lines_per_question + 1
        streams.read(tokens.beginnings(batch, line + 1) if is_beginning else tokens.lines(batch, first, line))
        yield line


def check_distances(distances: Sequence[int], num_lines: int, lines_per_question: int = LINES_PER_QUESTION) -> None:
    """Raise a ValueError for no question, and for a distance that is negative or too large."""
    last = (num_lines - 1) // lines_per_question * lines_per_question
    if last == 0:
        raise ValueError(
            f"--num-lines {num_lines} has no question, because the first one comes after line {lines_per_question}: "
            "raise --num-lines or lower --lines-per-question"
        )
    for distance in distances:
        if distance < 0:
            raise ValueError(f"--distances contains {distance}: distances are in lines and must be at least 0")
        if distance > last:
            needed = ceil(distance / lines_per_question) * lines_per_question
            raise ValueError(
                f"--distances contains {distance}, but the last question comes after line {last} of {num_lines}: "
                f"raise --num-lines above {needed}, lower --lines-per-question or remove this distance"
            )


def summarize(
    answers: Sequence[Answer], num_kept: int, window: int, seconds: float, memory: MemoryOptions | None = None
) -> dict[str, Any]:
    """Return accuracy by distance, and by place in the stream for each distance, ready for JSON."""
    places = []
    for line in sorted({answer.line for answer in answers}):
        there = [answer for answer in answers if answer.line == line]
        accuracy = {str(d): _accuracy(found) for d, found in _by_distance(there).items()}
        num_tokens = sum(answer.num_tokens for answer in there) / len(there)
        places.append({"line": line, "mean_num_tokens": num_tokens, "accuracy": accuracy})
    return {
        "configuration": cache_name(num_kept, window, memory),
        "num_kept": num_kept,
        "window": window,
        "memory": None if memory is None else asdict(memory),
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
    (ids,) = RecordTokens(tokenizer).lines([record], 0, len(record) - 1)
    return len(ids) / len(record)


def results_table(results: Sequence[dict[str, Any]], title: str) -> Table:
    """Return a table of accuracies in percent, by cache and distance."""
    table = Table(title=title)
    table.add_column("Cache")
    for column in results[0]["distances"]:
        table.add_column(str(column["lines"]), justify="right")
    for result in results:
        table.add_row(result["configuration"], *(f"{100 * column['accuracy']:.1f}" for column in result["distances"]))
    return table
