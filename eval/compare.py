"""Compares the reports of several models: one row a measurement, one column a model.

Only like is compared with like: a difference is computed if both reports have the same settings,
texts and questions. Where both have the outcome of each example (``--log-samples``, streaming
question answering), the difference is paired: its standard error is that of the mean of the
differences, which is smaller than that of two independent samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .saved_reports import READERS, Key, Run, Value, read_run, short_names

NUM_RUNS = 7  # colours of a picture


@dataclass(frozen=True)
class Difference:
    """``value`` of a run minus that of the first run."""

    value: float
    stderr: float | None
    is_paired: bool


@dataclass(frozen=True)
class Row:
    """One measurement of all runs; None where a run does not have it."""

    key: Key
    values: list[Value | None]
    differences: list[Difference | None]


@dataclass(frozen=True)
class Comparison:
    runs: list[Run]
    rows: list[Row]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON."""
        names = [run.name for run in self.runs]
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = dict(zip(("measurement", "name", "metric"), row.key, strict=True))
            entry["runs"] = [
                None if value is None else {"run": name, "value": value.value, "stderr": value.stderr}
                for name, value in zip(names, row.values, strict=True)
            ]
            entry["differences"] = [
                {
                    "run": name,
                    "minus": names[0],
                    "value": found.value,
                    "stderr": found.stderr,
                    "paired": found.is_paired,
                }
                for name, found in zip(names, row.differences, strict=True)
                if found is not None
            ]
            rows.append(entry)
        files = [{"name": run.name, "files": list(map(str, run.files))} for run in self.runs]
        return {"runs": files, "rows": rows, "notes": self.notes}


def compare(names: Sequence[str]) -> Comparison:
    """Compare runs. The first is the one that the others are compared with.

    Args:
        names: folders with reports, report files, or models that were evaluated without
            ``--output``.

    Raises:
        FileNotFoundError: there are no reports.
        ValueError: a file is not a report, the reports of a folder are of several models, or there
            are too few or too many runs.
    """
    if not 2 <= len(names) <= NUM_RUNS:
        raise ValueError(f"{len(names)} run{'s' * (len(names) != 1)}: compare at least 2 and at most {NUM_RUNS}")
    runs = [read_run(name, label) for name, label in zip(names, short_names(names), strict=True)]
    keys = list(dict.fromkeys(key for run in runs for key in run.values))
    order = [measurement for measurement, *_ in READERS.values()]
    keys.sort(key=lambda key: order.index(key[0]))  # stable: the order of the first report is kept
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    rows = []
    refused: dict[str, list[str]] = {}  # rows without a difference, by the reason
    for key in keys:
        values, is_without_first = without_first([run.values.get(key) for run in runs])
        if is_without_first:
            notes.append(f"{key[0]}: without the first token of the text, which only some of these models score")
        differences: list[Difference | None] = [None]
        for run, value in zip(runs[1:], values[1:], strict=True):
            found, unlike = difference(values[0], value)
            differences.append(found)
            pair = f"{runs[0].name} and {run.name}"
            if unlike:
                refused.setdefault(f"{key[0]}: {pair} differ in {unlike}", []).append(" ".join(key[1:]))
            elif values[0] and value and (others := _known(_unlike(values[0].noted, value.noted))):
                named = ", ".join(f"{name} ({ours} and {theirs})" for name, (ours, theirs) in others.items())
                notes.append(f"{key[0]}: {pair} differ in {named}, which may be a part of the differences")
        rows.append(Row(key, values, differences))
    notes += [f"{reason}: no difference in {', '.join(of)}" for reason, of in refused.items()]
    return Comparison(runs, rows, list(dict.fromkeys(notes)))


def without_first(values: list[Value | None]) -> tuple[list[Value | None], bool]:
    """Leave out the first token of a text where only some values include it.

    Returns:
        the values, and whether any has changed.
    """
    if len({value.scores_first for value in values if value}) < 2:
        return values, False
    rest = [
        value if value is None or value.after_first is None else replace(value, value=value.after_first)
        for value in values
    ]
    return rest, rest != values


def difference(first: Value | None, second: Value | None) -> tuple[Difference | None, str]:
    """Return ``second - first``, and the names of the settings in which they differ.

    The difference is None if a value is missing or a setting differs.
    """
    if first is None or second is None:
        return None, ""
    unlike = _unlike(first.conditions, second.conditions) | _known(_unlike(first.if_known, second.if_known))
    if unlike:
        return None, ", ".join(name + _both(*both) for name, both in unlike.items())
    change = second.value - first.value
    if first.examples and second.examples and first.examples.keys() == second.examples.keys():
        changes = [second.examples[key] - value for key, value in first.examples.items()]
        return Difference(change, stderr_of_mean(changes), True), ""
    stderr = None
    if first.stderr is not None and second.stderr is not None:
        stderr = math.hypot(first.stderr, second.stderr)
    return Difference(change, stderr, False), ""


def _unlike(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with both values."""
    both = {name: (first.get(name), second.get(name)) for name in first | second}
    return {name: (ours, theirs) for name, (ours, theirs) in both.items() if ours != theirs}


def _known(unlike: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {name: both for name, both in unlike.items() if None not in both}


def _both(ours: object, theirs: object) -> str:
    """Return two numbers for a note, or an empty text."""
    are_numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in (ours, theirs))
    return f" ({ours:,} and {theirs:,})" if are_numbers else ""


def stderr_of_mean(values: Sequence[float]) -> float | None:
    num = len(values)
    if num < 2:
        return None
    mean = math.fsum(values) / num
    return math.hypot(*(value - mean for value in values)) / math.sqrt((num - 1) * num)  # squares may be infinite
