"""Tables and the picture of a comparison."""

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from .compare import Comparison, Difference, Row
from .plots import COLOURS, MARKERS, STYLE, log_scale, save_figure
from .saved_reports import Value
from .tables import fitting_table, markdown_table, number

UNITS = {"zero-shot": "Accuracy", "perplexity": "Bits per byte", "streaming": "Perplexity (log scale)"}
UNITS |= {"stream-qa": "Exact match", "stream-eval": "Accuracy", "sinks": "Share"}
TITLES = {"zero-shot": "Zero-shot", "perplexity": "Perplexity by set", "streaming": "Streaming perplexity"}
TITLES |= {"stream-qa": "Streaming question answering", "stream-eval": "StreamEval", "sinks": "Attention sinks"}
PLOTTED = {
    "zero-shot": ("acc",),
    "perplexity": ("bits per byte",),
    "streaming": ("perplexity",),
    "stream-qa": ("exact match",),
    "stream-eval": ("accuracy",),
    "sinks": ("sink rate", "attention"),
}
LARGEST_DRAWN = 1e200  # the ticks of larger values would be infinite

CSV_COLUMNS = (
    *("measurement", "name", "metric", "run", "value", "stderr"),
    *("difference", "difference_stderr", "paired", "difference_to"),
)


def results_table(comparison: Comparison, title: str, width: int) -> Table:
    """Return a table for a terminal of ``width`` columns: of one line a run if it is too narrow."""
    return fitting_table(_wide_table(comparison, title), _long_table(comparison, title), width)


def _wide_table(comparison: Comparison, title: str) -> Table:
    header, rows = _cells(comparison)
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 3 else "right")
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous and previous[0] != row[0]:
            table.add_section()
        table.add_row(*row)
    return table


def _long_table(comparison: Comparison, title: str) -> Table:
    first = comparison.runs[0].name
    table = Table("Measurement and run", title=title)
    for name in ("Value", f"Difference to {first}"):
        table.add_column(name, justify="right")
    for row in comparison.rows:
        table.add_section()
        table.add_row(", ".join(part for part in row.key if part))
        for run, value, found in zip(comparison.runs, row.values, row.differences, strict=True):
            table.add_row(f"  {run.name}", _value(value), _difference(found))
    return table


def markdown(comparison: Comparison) -> str:
    """Return a table in Markdown, with the notes below it."""
    header, rows = _cells(comparison)
    text = markdown_table(header, rows, 3)
    if signs := legend(comparison):
        text += f"\n\n{signs}"
    return text + "\n" + "".join(f"\n- {note}" for note in comparison.notes) + ("\n" if comparison.notes else "")


def legend(comparison: Comparison) -> str:
    """Return what ± and p in the table mean, if it has them."""
    differences = [found for row in comparison.rows for found in row.differences if found is not None]
    errors = [value.stderr for row in comparison.rows for value in row.values if value is not None]
    errors += [found.stderr for found in differences]
    signs = ["± one standard error"] * any(error is not None for error in errors)
    signs += ["p: paired, over the same examples"] * any(found.is_paired for found in differences)
    return "; ".join(signs)


def csv_text(comparison: Comparison) -> str:
    """Return a table with one row for each measurement and run, and full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [run.name for run in comparison.runs]
    writer.writerow(CSV_COLUMNS)
    for row in comparison.rows:
        for name, value, found in zip(names, row.values, row.differences, strict=True):
            if value is None:
                continue
            change = [found.value, found.stderr, found.is_paired, names[0]] if found else [None] * 4
            writer.writerow([*row.key, name, value.value, value.stderr, *change])
    return buffer.getvalue()


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    names = [run.name for run in comparison.runs]
    header = ["Measurement", "", "Metric", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    rows = []
    for row in comparison.rows:
        values = [_value(value) for value in row.values]
        rows.append([*row.key, *values, *map(_difference, row.differences[1:])])
    return header, rows


def _value(value: Value | None) -> str:
    if value is None:
        return ""
    return _number(value.value) + (f" ± {_number(value.stderr)}" if value.stderr is not None else "")


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    text = ("+" if found.value >= 0 else "−") + _number(abs(found.value))
    if found.stderr is not None:
        text += f" ± {_number(found.stderr)}"
    return text + (" p" if found.is_paired else "")


def _number(value: float) -> str:
    if isinstance(value, int):  # a count
        return f"{value:,}"
    return number(value, 4 if abs(value) < 10 else 2)


def comparison_figure(comparison: Comparison) -> Figure | None:
    """Plot each run as one point a row, with error bars, in a panel for each measurement.

    Returns:
        None if no measurement can be plotted.
    """
    panels: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.key[2] in PLOTTED[row.key[0]]:
            panels.setdefault(row.key[0], []).append(row)
    if not panels:
        return None
    heights = [len(rows) + 1.6 for rows in panels.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 0.26 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (measurement, rows) in zip(grid, panels.items(), strict=True):
            _draw_panel(axes, comparison, measurement, rows)
        handles, labels = _legend(grid, comparison)
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)))
    return figure


def plot_comparison(comparison: Comparison, path: Path) -> bool:
    """Save `comparison_figure` as a PNG; return whether there was anything to plot.

    If there was not, the picture of an earlier comparison is deleted.
    """
    figure = comparison_figure(comparison)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    save_figure(figure, path)
    return True


def _draw_panel(axes: Any, comparison: Comparison, measurement: str, rows: list[Row]) -> None:
    num_runs = len(comparison.runs)
    for i, run in enumerate(comparison.runs):
        points = [(y, value) for y, row in enumerate(rows) if (value := row.values[i]) is not None]
        if not points:
            continue
        shift = 0.5 * ((i + 0.5) / num_runs - 0.5)  # equal values stay visible
        errors = [value.stderr or 0 for _, value in points]
        axes.errorbar(
            [min(value.value, LARGEST_DRAWN) for _, value in points],
            [y + shift for y, _ in points],
            xerr=errors if any(errors) else None,
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            capsize=2,
            color=COLOURS[i % len(COLOURS)],
            label=run.name,
        )
    metrics = {row.key[2] for row in rows}
    names = [row.key[1] if len(metrics) == 1 else f"{row.key[1]}: {row.key[2]}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if measurement == "streaming":
        log_scale(axes, "x")
        axes.tick_params(axis="x", which="both", length=3, pad=3.5)
    axes.set_xlabel(UNITS[measurement])
    axes.set_title(TITLES[measurement], loc="left", fontsize=9)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)


def _legend(grid: Any, comparison: Comparison) -> tuple[list[Any], list[str]]:
    found = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [run.name for run in comparison.runs if run.name in found]
    return [found[name] for name in names], names
