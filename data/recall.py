"""Generated records of lines with questions about earlier lines, to train recall.

A document is one record: lines that give a value to each of many keys, and questions that ask for
the value of a line some distance back, each followed by its answer. Every key has one value, and no
value or key occurs twice, so an answer is right and unique.

Each document has a phrasing of its own, of known and invented words, so that a model learns to
recall and not the phrasings. They have none of the phrases of the StreamEval test, which such
models are tested with, but some have its form: its line ``The REGISTER_CONTENT in line 7 is <123>``
is near to ``The BOX_CODE at slot 7 is <123>``.
"""

import io
import json
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from ..files import atomic_file, check_new, named_errors
from .recall_words import COMMON_WORDS, NOUNS

SET_NAME = "recall"
SUFFIXES = (".jsonl", ".jsonl.zst")
FEWEST_LINES = 4
LARGEST_NUMBER = 99_999
LARGEST_FIRST_KEY = 20_000  # of consecutive ones
KINDS_OF_KEYS = ("consecutive", "consecutive", "ascending", "numbers", "names")
LINES_PER_QUESTION = (1, 6)  # before lines are added for long distances
MOST_QUESTIONS = 3  # in a row, on average over a document
NUM_TRIES = 8

CONSONANTS, VOWELS, LETTERS = "bcdfghjklmnprstvwz", "aeiou", "abcdefghijklmnopqrstuvwxyz"
INVENTED_SHARE = 0.5  # of the words
SPELLED_SHARE = 0.5  # of the invented words: any letters; the others have syllables
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pa", "ra", "si", "tu", "ve", "wo", "zu", "an", "el")
INTRODUCTIONS = (
    "",
    "The following list has a {value} for each {thing}.\n",
    "Here are the {value}s of all {thing}s. Keep them in mind.\n",
    "# {Thing}s and their {value}s\n",
    "{Thing} list\n\n",
    "Read these {value}s. You will be asked about them.\n",
    "Log of {thing} {value}s:\n",
)
# … or sentences without a meaning, so that a model finds the first line after any introduction.
SENTENCES_SHARE = 0.5
MOST_SENTENCES = 3
WORDS_PER_SENTENCE = (3, 14)
COMMON_SHARE = 0.8  # of the words; the others are those of records or invented
SENTENCE_ENDS = (".", ".", ":", "!", ",", "")
SENTENCE_BREAKS = (" ", " ", "\n", "\n\n")
# What stands before and after the value of a line.
STATEMENTS = (
    ("The {value} of {thing} {key} is ", "."),
    ("{Thing} {key}: ", ""),
    ("{Thing} {key} has the {value} ", "."),
    ("{VALUE} of {THING} {key} = ", ""),
    ("{thing}_{key} = ", ""),
    ("{key} -> ", ""),
    ("{key}: ", ""),
    ("[{key}] ", ""),
    ("For {thing} {key}, the {value} is ", "."),
    ("The {THING}_{VALUE} at {key} is ", ""),
    ("{value}({key}) = ", ";"),
    ("In {thing} {key} the {value} was ", "."),
    ("- {thing} {key}, {value} ", ""),
)
# Or lines are put together: an opening, a name, a link, a place, a verb, the value, an end.
COMPOSED_SHARE = 0.6
OPENINGS = ("The ", "The ", "", "Our ", "- ", "* ", "> ", "This ", "Now the ", "a ")
NAMES = (
    *("{value}", "{thing} {value}", "{THING}_{VALUE}", "{Thing}{Value}", "{thing}-{value}", "{thing}_{value}"),
    *("{VALUE}", "{Value}", "{thing}.{value}", "{VALUE} {THING}", "{value} of the {thing}"),
)
LINKS = (" at ", " in ", " of ", " for ", " on ", " from ", " by ", " under ", " with ", " ", ", ", " / ")
PLACES = ("{key}", "{key}", "{place} {key}", "{place} {key}", "{PLACE} {key}", "number {key}", "no. {key}", "#{key}")
VERBS = (
    *(" is ", " is ", " was ", " = ", ": ", " -> ", " equals ", " has ", " reads ", " holds ", " shows ", " => "),
    *(" | ", " is set to ", " contains ", " is: "),
)
ENDS = ("", "", "", ".", ";", ",")
# A question repeats the beginning of its line after one of these words or an invented one …
REPEATING_SHARE = 0.75
PROMPTS = (
    *("Question", "Q", "Recall", "Repeat", "Ask", "Again", "", "Look up", ">", "Remember", "Check", "Test", "Now"),
    *("Find", "Search", "Request", "Please recall", "Answer", "Task", "Prompt", "User", "What was this", "Once more"),
)
SEPARATORS = (": ", ": ", ": ", "? ", " - ", " > ", "! ", " ")
# … or asks in other words; what stands before and after the answer.
ASKING = (
    ("What is the {value} of {thing} {key}? ", ""),
    ("Which {value} does {thing} {key} have? ", ""),
    ("Question: {thing} {key}? Answer: ", ""),
    ("Q: {value} for {key}\nA: ", ""),
    ("Tell me the {value} of {thing} {key}. It is ", "."),
    ("The {value} for {thing} {key}, as given above, is ", "."),
    ("{Thing} {key} had ", "."),
)
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
BRACKETS = (("", ""), ("<", ">"), ("(", ")"), ('"', '"'), ("[", "]"), ("#", ""), ("{", "}"))


@dataclass(frozen=True)
class Question:
    """The line that it asks for, the last line before it, and where its answer is in the text."""

    line: int
    last_line: int
    start: int
    end: int

    @property
    def distance(self) -> int:
        return self.last_line - self.line


@dataclass(frozen=True)
class RecallRecord:
    """A document: its text, the keys and values of its lines, and its questions."""

    text: str
    keys: list[str]
    values: list[str]
    questions: list[Question]

    def as_json(self) -> str:
        """Return a line in the Pile's form."""
        return json.dumps({"text": self.text, "meta": {"pile_set_name": SET_NAME}}, ensure_ascii=False)


@dataclass(frozen=True)
class Phrasing:
    """What a document's lines and questions look like."""

    words: dict[str, str]
    statement: tuple[str, str]
    question: tuple[str, str]
    introduction: str
    brackets: tuple[str, str]

    @staticmethod
    def draw(rng: random.Random) -> "Phrasing":
        words: dict[str, str] = {}
        for name in ("thing", "value", "place"):
            word = _word(rng, NOUNS)
            words |= {name: word, name.capitalize(): word.capitalize(), name.upper(): word.upper()}
        statement = _composed(rng) if rng.random() < COMPOSED_SHARE else rng.choice(STATEMENTS)
        if rng.random() < REPEATING_SHARE:
            question = (_word(rng, PROMPTS).capitalize() + rng.choice(SEPARATORS) + statement[0], statement[1])
        else:
            question = rng.choice(ASKING)
        introduction = _sentences(rng) if rng.random() < SENTENCES_SHARE else rng.choice(INTRODUCTIONS)
        return Phrasing(words, statement, question, introduction, rng.choice(BRACKETS))

    def filled(self, template: str, key: str = "") -> str:
        return template.format(key=key, **self.words)


def _word(rng: random.Random, known: Sequence[str]) -> str:
    """Return one of the words, or an invented one: any letters, or one to three syllables."""
    if rng.random() >= INVENTED_SHARE:
        return rng.choice(known)
    if rng.random() < SPELLED_SHARE:
        return "".join(rng.choices(LETTERS, k=rng.randint(3, 9)))
    return "".join(
        rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS) for _ in range(rng.randint(1, 3))
    )


def _sentences(rng: random.Random) -> str:
    """Return an introduction of random words."""
    text = ""
    for _ in range(rng.randint(1, MOST_SENTENCES)):
        words = [
            rng.choice(COMMON_WORDS) if rng.random() < COMMON_SHARE else _word(rng, NOUNS)
            for _ in range(rng.randint(*WORDS_PER_SENTENCE))
        ]
        sentence = " ".join(words)
        text += sentence[0].upper() + sentence[1:] + rng.choice(SENTENCE_ENDS) + rng.choice(SENTENCE_BREAKS)
    return f"{text.rstrip()}\n"


def _composed(rng: random.Random) -> tuple[str, str]:
    """Return what stands before and after the value of a line that is put together."""
    parts = (OPENINGS, NAMES, LINKS, PLACES, VERBS)
    return "".join(rng.choice(part) for part in parts), rng.choice(ENDS)


def make_record(seed: int, number: int, shortest: int, longest: int) -> RecallRecord:
    """Return document ``number`` of a seed. It does not depend on other documents.

    Args:
        shortest, longest: distances of questions in lines, from the last line before the question.
            Each is drawn log-uniformly. Every document has at least one question, and as many lines
            as its questions need.

    Raises:
        ValueError: distances that are negative or in the wrong order.
    """
    check_distances(shortest, longest)
    rng = random.Random(f"recall:{seed}:{number}")
    phrasing = Phrasing.draw(rng)
    places, num_lines = _places(rng, shortest, longest)
    keys = _keys(rng, num_lines)
    values = _values(rng, num_lines, set(keys))
    text = io.StringIO()
    text.write(phrasing.filled(phrasing.introduction))
    questions: list[Question] = []
    for line, (key, value) in enumerate(zip(keys, values, strict=True)):
        before, after = phrasing.statement
        text.write(f"{phrasing.filled(before, key)}{_bracketed(value, phrasing)}{after}\n")
        for target in places.get(line, ()):
            before, after = phrasing.question
            text.write(phrasing.filled(before, keys[target]))
            start = text.tell()
            text.write(_bracketed(values[target], phrasing))
            questions.append(Question(target, line, start, text.tell()))
            text.write(f"{after}\n")
    return RecallRecord(text.getvalue(), keys, values, questions)


def _places(rng: random.Random, shortest: int, longest: int) -> tuple[dict[int, list[int]], int]:
    """Draw the questions of a document: after which lines, each for which line.

    The distances are drawn first and none is rejected. Rejecting those that do not fit a document
    would make long ones rare.

    Returns:
        The lines that are asked for, by the line before their questions, and the number of lines.
    """
    fewest = max(FEWEST_LINES, shortest + 1)
    num_lines = _log_uniform(rng, fewest, max(2 * fewest, longest + longest // 2))
    every = rng.randint(*LINES_PER_QUESTION)
    distances = [_log_uniform(rng, shortest, longest) for _ in range(max(1, num_lines // every))]
    num_lines = max(num_lines, max(distances) + 1)
    grid = every * rng.randint(1, MOST_QUESTIONS)
    places: dict[int, list[int]] = {}
    asked: set[int] = set()
    for distance in distances:
        line = _free_line(rng, distance, num_lines, grid, asked)
        num_lines = max(num_lines, line + 1)
        asked.add(line - distance)
        places.setdefault(line, []).append(line - distance)
    return places, num_lines


def _free_line(rng: random.Random, distance: int, num_lines: int, grid: int, asked: set[int]) -> int:
    """Draw a line after which to ask for one that was not asked for, ``distance`` lines before it.

    It is the last of a multiple of ``grid`` lines if one of a few tries is free, else any line,
    else one to be added.
    """
    for lines in (range(distance + -(distance + 1) % grid, num_lines, grid), range(distance, num_lines)):
        for line in rng.sample(lines, min(len(lines), NUM_TRIES)):
            if line - distance not in asked:
                return line
    line = num_lines
    while line - distance in asked:
        line += 1
    return line


def check_distances(shortest: int, longest: int) -> None:
    """Raise a ValueError for distances that no question can have."""
    if not 0 <= shortest <= longest <= LARGEST_NUMBER // 4:
        raise ValueError(
            f"--distances {shortest}-{longest}: write the shortest and the longest distance in lines, such as 0-200, "
            f"of at most {LARGEST_NUMBER // 4}"
        )


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    """Draw an integer from ``low`` to ``high``: each octave is as likely as any other."""
    return min(high, int(math.exp(rng.uniform(math.log(low + 1), math.log(high + 2)))) - 1)


def _keys(rng: random.Random, count: int) -> list[str]:
    kind = rng.choice(KINDS_OF_KEYS)
    if kind == "consecutive":
        first = rng.choice((0, 1, _log_uniform(rng, 0, LARGEST_FIRST_KEY)))
        return [str(first + i) for i in range(count)]
    if kind == "names":
        return _distinct(lambda: "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))), count)
    largest = max(4 * count, rng.choice((100, 1000, LARGEST_NUMBER)))
    numbers = rng.sample(range(largest), count)
    return [str(number) for number in (sorted(numbers) if kind == "ascending" else numbers)]


def _values(rng: random.Random, count: int, keys: set[str]) -> list[str]:
    kind, length = rng.choice(("numbers", "numbers", "padded", "words", "mixed")), rng.randint(2, 4)
    if kind == "words":
        return _distinct(lambda: "-".join(rng.choices(SYLLABLES, k=length)), count, keys)
    if kind == "mixed":
        return _distinct(lambda: "".join(rng.choices(CHARACTERS, k=length + 2)), count, keys)
    width = 5 if kind == "padded" else 0
    return _distinct(lambda: f"{rng.randint(1, LARGEST_NUMBER):0{width}}", count, keys)


def _distinct(draw: Callable[[], str], count: int, taken: Collection[str] = ()) -> list[str]:
    """Draw ``count`` different texts that are not taken. If they run out, they get numbers."""
    found: dict[str, None] = {}
    num_drawn = 0
    while len(found) < count:
        num_drawn += 1
        text = draw() if num_drawn < 20 * count else f"{draw()}{num_drawn}"
        if text not in taken:
            found[text] = None
    return list(found)


def _bracketed(value: str, phrasing: Phrasing) -> str:
    return f"{phrasing.brackets[0]}{value}{phrasing.brackets[1]}"


def records(seed: int, shortest: int, longest: int) -> Iterator[RecallRecord]:
    """Yield the documents of a seed, without end."""
    number = 0
    while True:
        yield make_record(seed, number, shortest, longest)
        number += 1


def write_records(path: Path, documents: Iterable[RecallRecord]) -> tuple[int, int]:
    """Write documents as JSON lines, compressed if the name ends in ``.zst``.

    Returns:
        The numbers of documents and of questions.

    Raises:
        ValueError: the name has another suffix.
        FileExistsError: the file exists.
        OSError: it cannot be written.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    path = check_new(path, "file")
    num_documents = num_questions = 0
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, binary=True) as file:
            compressor = zstandard.ZstdCompressor(write_checksum=True) if path.suffix == ".zst" else None
            stream: Any = compressor.stream_writer(file, closefd=False) if compressor else file
            for document in documents:
                stream.write(f"{document.as_json()}\n".encode())
                num_documents, num_questions = num_documents + 1, num_questions + len(document.questions)
            if compressor:
                stream.close()
    return num_documents, num_questions
