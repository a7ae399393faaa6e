"""Tables and the picture of `sinklm eval quantization`, from its report."""

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from .plots import COLOURS, MARKERS, STYLE, save_figure
from .quantization_formats import FORMATS
from .tables import fitting_table, markdown_table

CSV_COLUMNS = (
    *("run", "sink_kind", "largest_activation", "largest_ratio", "num_massive_activations", "loss"),
    *("format", "quantized_loss", "increase", "stderr"),
)
LINEAR_BELOW = 1e-3  # nats; the axis is logarithmic above


def results_table(report: dict[str, Any], title: str, width: int) -> Table:
    """Return a table for a terminal of ``width`` columns: a line a format if it is too narrow."""
    return fitting_table(_wide_table(report, title), _long_table(report, title), width)


def _wide_table(report: dict[str, Any], title: str) -> Table:
    table = Table(title=title)
    for i, name in enumerate(_header(report)):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in _rows(report):
        table.add_row(*row)
    return table


def _long_table(report: dict[str, Any], title: str) -> Table:
    header = _header(report)
    table = Table("Run", title=title)
    table.add_column("", justify="right")
    for name, *cells in _rows(report):
        table.add_section()
        table.add_row(name, "")
        for what, cell in zip(header[1:], cells, strict=True):
            if cell:
                table.add_row(f"  {what}", cell)
    return table


def markdown(report: dict[str, Any]) -> str:
    """Return a table in Markdown, with what the columns are below it."""
    text = markdown_table(_header(report), _rows(report), 2)
    text += "\n\nIncrease of the loss in nats per token, ± one standard error, paired over samples.\n\n"
    text += "".join(f"- `{name}`: {FORMATS[name].description}\n" for name in report["formats"])
    return text + "".join(f"- {note}\n" for note in report["notes"])


def csv_text(report: dict[str, Any]) -> str:
    """Return a table with one row for each run and format, and full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in report["runs"]:
        facts = [run["name"], run["model"]["sink_kind"], run["largest_activation"], run["largest_ratio"]]
        facts += [len(run["massive_activations"]), run["loss"]]
        for found in run["formats"]:
            writer.writerow([*facts, found["format"], found["loss"], found["increase"], found["stderr"]])
    return buffer.getvalue()


def _header(report: dict[str, Any]) -> list[str]:
    return ["Run", "Arm", "Largest activation", "× median", "Massive", "Loss", *report["formats"]]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in report["runs"]:
        facts = [f"{run['largest_activation']:,.1f}", f"{run['largest_ratio']:,.0f}"]
        facts += [str(len(run["massive_activations"])), f"{run['loss']:.4f}"]
        found = {increase["format"]: increase for increase in run["formats"]}
        increases = [_increase(found[name]) if name in found else "" for name in report["formats"]]
        rows.append([run["name"], _arm(run), *facts, *increases])
    return rows


def _arm(run: dict[str, Any]) -> str:
    kind, num_sinks = run["model"]["sink_kind"], run["model"]["num_sinks"]
    return f"{num_sinks} tokens" if num_sinks > 1 else kind or ""


def _increase(found: dict[str, Any]) -> str:
    text = ("+" if found["increase"] >= 0 else "−") + f"{abs(found['increase']):.4f}"
    return text if found["stderr"] is None else f"{text} ± {found['stderr']:.4f}"


def plot_quantization(report: dict[str, Any], path: Path, title: str | None = None) -> None:
    """Save `quantization_figure` as a PNG."""
    save_figure(quantization_figure(report, title), path)


def quantization_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot a row for each run: what each format adds to its loss, and its largest activation."""
    runs = report["runs"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 1.5 + 0.32 * len(runs)), layout="constrained")
        increases, largest = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [2, 1]})
        _draw_increases(increases, report)
        ratios = [run["largest_ratio"] for run in runs]
        largest.plot(ratios, range(len(runs)), "D", color=COLOURS[0], markersize=4.5)
        largest.set_xscale("log")
        largest.set_xlim(min(ratios) / 3, 3 * max(ratios))  # at least one power of ten
        largest.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        largest.xaxis.set_minor_formatter(lambda value, _: "")
        largest.set_xlabel("Largest activation / median\n(log scale)")
        increases.set_yticks(range(len(runs)), [run["name"] for run in runs])
        increases.set_ylim(len(runs) - 0.5, -0.5)
        for axes in (increases, largest):
            axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        handles, labels = increases.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        if title:
            increases.set_title(title, loc="left", fontsize=10)
    return figure


def _draw_increases(axes: Axes, report: dict[str, Any]) -> None:
    names = report["formats"]
    for i, name in enumerate(names):
        found = [
            (y, increase)
            for y, run in enumerate(report["runs"])
            for increase in run["formats"]
            if increase["format"] == name
        ]
        shift = 0.6 * ((i + 0.5) / len(names) - 0.5)  # equal values stay visible
        axes.errorbar(
            [increase["increase"] for _, increase in found],
            [y + shift for y, _ in found],
            xerr=[increase["stderr"] or 0 for _, increase in found],
            linestyle="none",
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            capsize=2,
            color=COLOURS[i % len(COLOURS)],
            label=FORMATS[name].title,
        )
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    axes.set_xlabel(f"Increase of the loss (nats per token; linear below {LINEAR_BELOW:g})")
