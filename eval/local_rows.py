"""Reads the rows of local data sets, and checks what lm-eval would score as wrong or fail on."""

import bz2
import gzip
import logging
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from ..parsing import parse_json
from ..text import UTF_16, not_utf8, one_line

Row = dict[str, Any]
FIELDS = {  # that lm-eval reads of the paper's data sets; the last one is the right answer, if any
    "allenai/ai2_arc": ("question", "choices", "answerKey"),
    "Rowan/hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "EleutherAI/lambada_openai": ("text",),
    "allenai/openbookqa": ("question_stem", "choices", "answerKey"),
    "baber/piqa": ("goal", "sol1", "sol2", "label"),
    "allenai/winogrande": ("sentence", "option1", "option2", "answer"),
}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _is_a_label(row: Row) -> bool:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return len(labels) == len(texts) and row["answerKey"].lstrip() in labels  # lstrip as lm-eval


ANSWERS: dict[str, Callable[[Row], bool]] = {  # whether the right answer is one of the choices
    "allenai/ai2_arc": _is_a_label,
    "allenai/openbookqa": _is_a_label,
    "Rowan/hellaswag": lambda row: int(row["label"]) in range(len(row["endings"])),
    "baber/piqa": lambda row: type(row["label"]) is int and row["label"] in (0, 1),  # text would be wrong
    "allenai/winogrande": lambda row: row["answer"] in ("1", "2"),
}


def read_rows(builder: str, data_files: dict[str, list[str]]) -> datasets.DatasetDict:
    """Return the rows of local files by split.

    Args:
        builder: reader of `datasets`: ``json``, ``parquet`` or ``arrow``.

    Raises:
        ValueError: a file is damaged or has no rows.
    """
    paths = [Path(path) for files in data_files.values() for path in files]
    logger = logging.getLogger("datasets")  # it would print the error too
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        rows = datasets.load_dataset(builder, data_files=data_files)
    except (DatasetGenerationError, ValueError, OSError, EOFError, TypeError) as error:
        for path in paths if builder == "json" else []:
            if damage := _damage(path):
                raise ValueError(f"{path} {damage}: correct it, or download it again") from error
        reason = error.__cause__ or error
        named = ", ".join(map(str, paths))
        if "corresponds to no data" in str(reason):
            raise ValueError(f"{named}: no rows; download it again") from error
        raise ValueError(f"{named}: cannot be read ({one_line(reason)}); download it again") from error
    finally:
        logger.setLevel(level)
    for path in paths if builder == "json" else []:  # datasets reads any bytes as text, and fails when it is used
        if reason := not_utf8(_content(path)):
            raise ValueError(f"{path} is not UTF-8 ({reason}): convert it to UTF-8, or download it again")
    return rows


def _content(path: Path) -> bytes:
    """Return the bytes of a file that may be compressed; none of a zstd file."""
    if path.suffix.lower() == ".zst":
        return b""
    with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
        return file.read()


def _damage(path: Path) -> str:
    """Return what is wrong with a file of JSON or JSON lines, and the line; empty if nothing is."""
    number = 0
    try:
        if not (content := _content(path)):
            return ""  # datasets names the error
        if content.startswith(UTF_16):
            return "is UTF-16 and not UTF-8"
        try:
            if isinstance(parse_json(content), dict | list):
                return ""  # one value, or a single line
        except ValueError as error:
            if content.lstrip().startswith(b"["):
                return f"is damaged ({one_line(error)})"
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip() and not isinstance(parse_json(line), dict):
                return f"has no JSON object in line {number}"
    except ValueError as error:
        return f"is damaged in line {number} ({one_line(error)})"
    except (OSError, EOFError, lzma.LZMAError) as error:
        return f"is damaged ({one_line(error)})"
    return ""


def check_rows(name: str, rows: datasets.Dataset, path: Path) -> None:
    """Check the fields and the answers of one of the paper's data sets; of others, nothing.

    Args:
        name: of the data set on the Hub.
        path: the first file of the rows, for the message.

    Raises:
        ValueError: a row lacks a field, has null in it, or its answer is not one of the choices.
    """
    fields = FIELDS.get(name, ())
    if missing := [field for field in fields if field not in rows.column_names]:
        raise ValueError(
            f"{path} has no field {missing[0]!r}, only {', '.join(rows.column_names)}: use the data set {name} of the "
            f"Hub, which has {', '.join(fields)}"
        )
    has_answer = ANSWERS.get(name, lambda row: True)
    for number, row in enumerate(rows if fields else ()):
        if row[fields[-1]] in (None, "", -1, "-1"):
            raise ValueError(f"{path} has no {fields[-1]} in row {number}: use a split with labels")
        if empty := [field for field in fields if _has_null(row[field])]:
            raise ValueError(f"{path} has null as {empty[0]} in row {number}: correct it, or download {name} again")
        try:
            is_right = has_answer(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            is_right = False
        if not is_right:
            raise ValueError(
                f"{path} has the {fields[-1]} {repr(row[fields[-1]])[:40]} in row {number}, which is not one of its "
                f"choices: correct it, or download {name} again"
            )


def _has_null(value: Any) -> bool:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_has_null, inner))
