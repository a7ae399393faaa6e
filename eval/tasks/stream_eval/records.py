"""The text of StreamEval: records of numbered lines, and questions. Requires only `datasets`.

lm-eval loads this file by its path, so it works without sinklm.
"""

import random
from collections.abc import Sequence
from typing import Any

PREAMBLE = "Below is a record of lines I want you to remember.\n"
LINES_PER_QUESTION = 10
LARGEST_NUMBER = 50_000  # as in LongEval, on which the task is based


def make_records(num_samples: int, num_lines: int, seed: int) -> list[list[int]]:
    """Return the numbers of each sample's lines; a sample does not depend on ``num_samples``."""
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


def record_text(record: Sequence[int], num_lines: int) -> str:
    """Return the preamble and the first lines of a record."""
    return PREAMBLE + "".join(line_text(i, record[i]) for i in range(num_lines))


def dataset(num_samples: int = 20, num_lines: int = 71, distance: int = 20, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Return the split ``test`` for lm-eval: a question after every tenth line.

    Args:
        num_samples, num_lines, seed: as in `make_records`.
        distance: lines between the last line read and the line in question.

    Raises:
        ValueError: the distance does not fit the number of lines.
    """
    from datasets import Dataset

    rows = [
        {
            "text": record_text(record, line + 1) + question_text(line - distance),
            "answer": f" <{record[line - distance]}>",
            "sample": sample,
            "line": line,
        }
        for sample, record in enumerate(make_records(num_samples, num_lines, seed))
        for line in range(LINES_PER_QUESTION, num_lines, LINES_PER_QUESTION)
        if 0 <= distance <= line
    ]
    if not rows:
        raise ValueError(f"stream_eval: no question fits distance={distance} and num_lines={num_lines}")
    return {"test": Dataset.from_list(rows)}
