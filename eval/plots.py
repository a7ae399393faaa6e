"""Plots of evaluations, made without a display, in colours for colour-blind readers."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .tables import number

# Okabe & Ito's palette without yellow, which is too light on white.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Later curves are drawn over earlier ones: these leave gaps in which an equal curve is visible.
DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (1, 3)), (0, (4, 6)))
MARKERS = "os^Dvx"
METHOD_NAMES = {"floor": "limit of memory bandwidth"}
CACHE_TITLE = "cache: first +\nrecent tokens"
NUM_PLACES = 20  # points of a curve over the stream
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # shows the dashes
    "text.parse_math": False,  # a model's name may contain "$"
    "figure.dpi": 300,
}


def curve_style(i: int, num_curves: int) -> dict[str, Any]:
    """Return the style of curve i: equal curves stay visible by dashes and decreasing widths."""
    width = 1.2 + 1.4 * (1 - (i + 1) / num_curves)
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": width}


def log_scale(axes: Axes, name: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic, after all curves. Labels are plain text: formulas are off."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    low, high = axis.get_view_interval()
    # Otherwise the powers of ten are enough.
    labelled = "23456789" if high < 4 * low else "235" if high < 30 * low else ""
    axis.set_minor_formatter(lambda value, _: text if (text := f"{value:,.12g}")[0] in labelled else "")


def plot_streaming(report: dict[str, Any], path: Path, title: str | None = None) -> None:
    """Save `streaming_figure` as a PNG."""
    save_figure(streaming_figure(report, title), path)


def streaming_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot loss against position for each configuration of a report (see `perplexity.as_json`).

    Positions are on a log scale; each point is the mean over one bin. Vertical lines mark the
    smallest cache size and the trained length.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        _draw_losses(axes, report)
        _mark_positions(axes, report)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
        axes.set_xlabel("Position in the text (tokens, log scale)")
        axes.set_ylabel("Mean loss of a token (nats)")
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.legend(title=f"{CACHE_TITLE};\nperplexity", loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
        if title:
            axes.set_title(title, loc="left", fontsize=10, pad=14)
    return figure


def plot_stream_eval(report: dict[str, Any], path: Path, title: str | None = None) -> None:
    """Save `stream_eval_figure` as a PNG."""
    save_figure(stream_eval_figure(report, title), path)


def stream_eval_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot StreamEval accuracy against distance and, at the shortest distance, against tokens read.

    Dotted lines in the left panel mark the distance at which a line leaves the window of a cache.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        by_distance, by_place = figure.subplots(1, 2, sharey=True)
        for i, result in enumerate(report["results"]):
            style = curve_style(i, len(report["results"])) | {"label": result["configuration"]}
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 3 * style["linewidth"]}
            columns = result["distances"]
            by_distance.plot([c["lines"] for c in columns], [100 * c["accuracy"] for c in columns], **style)
            reach = result["window"] / report["tokens_per_line"]
            if reach < columns[-1]["lines"]:
                by_distance.axvline(reach, color=style["color"], linewidth=0.8, linestyle=":", zorder=0)
            shortest = str(columns[0]["lines"])
            places, accuracies = _smooth([p for p in result["places"] if shortest in p["accuracy"]], shortest)
            by_place.plot(places, accuracies, **style)
        by_distance.set_xlabel("Distance (lines back; dotted: end of the window)")
        by_distance.set_ylabel("Correct answers (%)")
        by_distance.set_ylim(-3, 103)
        by_distance.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        by_place.set_xlabel(f"Tokens read before a question {shortest} lines back")
        by_place.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        by_place.legend(title=CACHE_TITLE, loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
        for axes in (by_distance, by_place):
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        if title:
            by_distance.set_title(title, loc="left", fontsize=10)
    return figure


def plot_stream_qa(report: dict[str, Any], path: Path, title: str | None = None) -> None:
    """Save `stream_qa_figure` as a PNG."""
    save_figure(stream_qa_figure(report, title), path)


def stream_qa_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot exact match over the stream, a panel for each task; one-shot is a horizontal line."""
    tasks = list(dict.fromkeys(result["task"] for result in report["results"]))
    names = list(dict.fromkeys(result["configuration"] for result in report["results"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.0 + 3.2 * len(tasks), 3.2), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
            rows = [result for result in report["results"] if result["task"] == task]
            for row in rows:
                i = names.index(row["configuration"])  # a task may lack one
                style = {"color": COLOURS[i % len(COLOURS)], "label": row["configuration"]}
                if row["method"] == "one-shot":
                    axes.axhline(100 * row["exact_match"], linestyle="--", zorder=0, **style)
                    continue
                style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 3 + 4 * (1 - i / len(names))}
                places = row["places"]
                axes.plot([p["mean_num_tokens"] for p in places], [100 * p["exact_match"] for p in places], **style)
            axes.set_title(task, fontsize=9)
            axes.set_xlabel("Tokens read")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        figure.axes[0].set_ylabel("Exact match (%)")
        figure.axes[0].set_ylim(bottom=-3)  # shared, so after all curves
        drawn = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
        lines = {label: line for panel in drawn for line, label in panel}
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "alignment": "left"}
        figure.axes[-1].legend([lines[name] for name in names], names, title="cache", **place)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def plot_decoding(report: dict[str, Any], path: Path, title: str | None = None) -> None:
    """Save `decoding_figure` as a PNG."""
    save_figure(decoding_figure(report, title), path)


def decoding_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot milliseconds per token and, if measured, peak memory against cache size, on log scales.

    One line for each method: solid for the smallest batch, dashed and dotted for larger ones.
    """
    rows = report["results"]
    has_memory = any(row["peak_bytes"] for row in rows)
    batch_sizes = sorted({row["batch_size"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0 if has_memory else 5.0, 3.2), layout="constrained")
        panels = figure.subplots(1, 1 + has_memory, squeeze=False)[0]
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            for j, batch_size in enumerate(batch_sizes):
                chosen = [row for row in rows if (row["method"], row["batch_size"]) == (method, batch_size)]
                name = METHOD_NAMES.get(method, method)
                label = f"{name}, batch {batch_size}" if len(batch_sizes) > 1 else name
                style = {
                    "color": COLOURS[i],
                    "marker": MARKERS[i],
                    "linestyle": ("-", "--", ":")[j % 3],
                    "label": label,
                }
                sizes = [row["cache_size"] for row in chosen]
                panels[0].plot(sizes, [row["milliseconds"] for row in chosen], markersize=4, **style)
                if has_memory and chosen[0]["peak_bytes"]:
                    panels[1].plot(sizes, [row["peak_bytes"] / 1e9 for row in chosen], markersize=4, **style)
        for axes, quantity in zip(panels, ("Time per token (ms)", "Peak memory (GB)"), strict=False):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("Cache size (tokens)")
            axes.set_ylabel(quantity)
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        log_scale(panels[0])
        lines, labels = panels[0].get_legend_handles_labels()  # the floor has a time but no memory
        panels[-1].legend(lines, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if title:
            panels[0].set_title(title, loc="left", fontsize=10)
    return figure


def _smooth(places: list[dict[str, Any]], distance: str) -> tuple[list[float], list[float]]:
    """Average neighbouring places to `NUM_PLACES` points: tokens read, accuracy in percent."""
    size = -(-len(places) // NUM_PLACES)
    runs = [places[i : i + size] for i in range(0, len(places), size)]
    tokens = [sum(p["mean_num_tokens"] for p in run) / len(run) for run in runs]
    return tokens, [100 * sum(p["accuracy"][distance] for p in run) / len(run) for run in runs]


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    edges = report["bin_edges"]
    centres = [max((a * b) ** 0.5, b / 2) for a, b in pairwise(edges)]
    most = max((result["num_scored"] for result in report["results"]), default=0)
    for i, result in enumerate(report["results"]):
        losses = [float("nan") if loss is None else loss for loss in result["binned_losses"]]
        value = result["perplexity"]
        label = f"{result['configuration']}: {number(value, 2 if value < 1000 else 0)}"
        if result["num_scored"] < most:  # not comparable with the others
            label += f"\n({result['num_scored']:,} tokens)"
        axes.plot(centres, losses, label=label, **curve_style(i, len(report["results"])))


def _mark_positions(axes: Axes, report: dict[str, Any]) -> None:
    last = report["bin_edges"][-1]
    cached = [r["num_kept"] + r["window"] for r in report["results"] if r["method"] != "dense"]
    marks = {"cache full": min(cached, default=None), "trained length": report["model"]["max_position_embeddings"]}
    shown = sorted((position, text) for text, position in marks.items() if position and position < last)
    # Away from each other, because they may be close.
    for (position, text), alignment, offset in zip(shown, ("right", "left"), (-2, 2), strict=False):
        axes.axvline(position, color="0.6", linewidth=0.8, zorder=0)
        axes.annotate(
            text, (position, 1.0), xycoords=("data", "axes fraction"), xytext=(offset, 2), textcoords="offset points",
            ha=alignment, va="bottom", fontsize=7, color="0.4",
        )  # fmt: skip


def short_number(tokens: float) -> str:
    """Format a number of tokens for an axis: 512, 4K, 1M."""
    if tokens >= 2**20:
        return f"{tokens / 2**20:g}M"
    return f"{tokens / 2**10:g}K" if tokens >= 2**10 else f"{tokens:g}"


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG, and create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
