"""The figures of docs/results/paper.md."""

from collections.abc import Callable
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import above_vanilla, arm_of, at_place, cost_over_training

from sinklm.eval.plots import COLOURS, STYLE, save_figure

Runs = dict[str, dict[str, Any]]
FIRST_SHOWN = 0.05  # losses are compared after this share of training; before it they fall too fast
NUM_COLUMNS = 4  # columns of panels in `streaming_figure`
LARGEST_LINEAR = 0.01  # loss in that figure up to which the scale is linear


def draw(arms: Runs, deeper: Runs, folder: Path) -> None:
    """Save all figures for which there is data as ``paper-….png``."""
    figures: dict[str, tuple[Callable[[Runs], Figure | None], Runs]] = {
        "loss": (loss_figure, arms),
        "sinks": (sinks_figure, arms),
        "forming": (forming_figure, arms),
        "streaming": (streaming_figure, arms),
        "depth": (depth_figure, arms | deeper),
    }
    for name, (make, runs) in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = make(runs)
        if figure is not None:
            save_figure(figure, folder / f"paper-{name}.png")


def style_of(name: str, runs: Runs) -> dict[str, Any]:
    """Return the style of a run: a colour for each arm; further seeds are dashed."""
    arms = list(dict.fromkeys(arm_of(run) for run in runs))
    return {
        "color": COLOURS[arms.index(arm_of(name)) % len(COLOURS)],
        "linestyle": "-" if name == arm_of(name) else "--",
        "label": name,
    }


def loss_figure(runs: Runs) -> Figure:
    """Plot validation loss against tokens, and its excess over vanilla's of the same seed."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    losses, relative = figure.subplots(1, 2)
    for name, run in runs.items():
        curve = run["validation_loss"]
        losses.plot(*_columns(curve), **style_of(name, runs))
        if shown := [[t, above] for t, above in above_vanilla(name, runs) if t > FIRST_SHOWN * run["tokens"]]:
            relative.plot(*_columns(shown), **style_of(name, runs))
    losses.set_ylabel("Validation loss (nats per token)")
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    losses.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    relative.set_ylabel("Loss relative to vanilla, same seed (%)")
    relative.axhline(0, color=COLOURS[0], linewidth=0.8)
    _finish(figure, losses, relative)
    return figure


def sinks_figure(runs: Runs) -> Figure | None:
    """Plot sink rate over training: sink token (larger of two), first text token, no token."""
    measured = {name: run["sinks"] for name, run in runs.items() if "sinks" in run}
    if not measured:
        return None
    curves = {what: _sink_curves(measured, what) for what in ("sink token", "first text token", "no token")}
    curves = {what: found for what, found in curves.items() if found}
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    panels = figure.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (what, found) in zip(panels, curves.items(), strict=True):
        for name, curve in found.items():
            axes.plot(*_columns(curve), **style_of(name, runs))
        axes.set_title(f"on {'' if what.startswith('no') else 'the '}{what}", fontsize=9)
    epsilon = next(iter(measured.values()))["epsilon"]
    panels[0].set_ylabel(f"Heads with attention > {epsilon:g} (%)")
    _finish(figure, *panels, legend_of=panels[list(curves).index("first text token")])
    return figure


def _sink_curves(measured: dict[str, dict[str, Any]], what: str) -> dict[str, list[list[float]]]:
    """Return the sink rate of ``what`` over the checkpoints, for the runs that have it."""
    curves = {
        name: [
            [checkpoint["tokens"], 100 * max(at_place(checkpoint["sink_rate"], what), default=0)]
            for checkpoint in report["checkpoints"]
        ]
        for name, report in measured.items()
    }
    return {name: curve for name, curve in curves.items() if what == "first text token" or any(r for _, r in curve)}


def forming_figure(runs: Runs) -> Figure | None:
    """Plot the cost of evicting the first tokens, and of keeping only one, over training."""
    measured = {name: run for name, run in runs.items() if "forming" in run}
    if not measured:
        return None
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, axes in enumerate(panels):
        for name, run in measured.items():
            axes.plot(*_columns(cost_over_training(run, i)), **style_of(name, runs))
        axes.set_ylabel(_cost_label(measured, i))
        axes.set_title(("no token kept", "one token kept")[i], fontsize=9)
    _finish(figure, *panels)
    return figure


def depth_figure(runs: Runs) -> Figure | None:
    """Plot the cost of evicting the first tokens over training, by number of layers."""
    measured = {name: run for name, run in runs.items() if "forming" in run}
    layers = {name: run["config"]["model"]["num_hidden_layers"] for name, run in measured.items()}
    depths = sorted(set(layers.values()))
    if len(depths) < 2:
        return None
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, arm in zip(panels, ("vanilla", "learnable-sink"), strict=True):
        for name in (name for name in measured if name.startswith(arm)):
            style = style_of(name, runs) | {"color": COLOURS[depths.index(layers[name]) % len(COLOURS)]}
            style["label"] = f"{layers[name]} layers" + (", second seed" if style["linestyle"] == "--" else "")
            axes.plot(*_columns(cost_over_training(measured[name], 0)), **style)
        axes.set_title({"vanilla": "no sink token (vanilla)", "learnable-sink": "one sink token"}[arm], fontsize=9)
    panels[0].set_ylabel(_cost_label(measured, 0))
    _finish(figure, *panels, legend_of=max(panels, key=lambda axes: len(axes.lines)))
    return figure


def _cost_label(runs: Runs, cache: int) -> str:
    caches = list(next(iter(runs.values()))["forming"]["checkpoints"][0]["perplexity"])
    return f"Perplexity ratio, {caches[cache]} / {caches[-1]}"


def streaming_figure(runs: Runs) -> Figure | None:
    """Plot the cost of fewer kept tokens against the most, by position in one long text."""
    measured = {name: run["streaming"] for name, run in runs.items() if "streaming" in run and name == arm_of(name)}
    if not measured:
        return None
    num_rows = -(-len(measured) // NUM_COLUMNS)
    figure = Figure(figsize=(8.0, 0.8 + 1.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, NUM_COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, report) in zip(panels, measured.items(), strict=False):
        axes.set_title(name, fontsize=9)
        largest = _draw_costs(axes, report)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
    for i, axes in enumerate(panels):
        axes.tick_params(labelbottom=i + NUM_COLUMNS >= len(measured))
        axes.set_visible(i < len(measured))
    figure.supxlabel("Position in the text (tokens, log scale)", fontsize=9)
    figure.supylabel(f"Extra loss compared with cache {largest} (nats)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_costs(axes: Axes, report: dict[str, Any]) -> str:
    """Draw a line for each cache except the one with the most kept tokens, and return its name."""
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LARGEST_LINEAR)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    *smaller, largest = (cache for cache in report["binned_losses"] if cache != "dense")
    for i, cache in enumerate(smaller, start=1):
        curve = _columns(cost_by_position(report, cache, largest))
        width = 2.8 - 0.6 * i  # keeps equal curves visible
        axes.plot(*curve, color=COLOURS[i], linewidth=width, label=f"{cache.partition('+')[0]} kept (cache {cache})")
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    return largest


def cost_by_position(report: dict[str, Any], cache: str, largest: str) -> list[list[float]]:
    """Return ``[position, loss above largest]``: a mean for each doubling after a cache is full."""
    size = sum(map(int, largest.split("+")))
    octaves: dict[int, list[tuple[int, int, float]]] = {}
    losses, lowest = (report["binned_losses"][name] for name in (cache, largest))
    for (start, end), loss, low in zip(pairwise(report["bin_edges"]), losses, lowest, strict=True):
        if start >= size and loss is not None and low is not None:
            octaves.setdefault(int(log2(start / size)), []).append((start, end, loss - low))
    return [[(bins[0][0] * bins[-1][1]) ** 0.5, _mean(bins)] for bins in octaves.values()]


def _mean(bins: list[tuple[int, int, float]]) -> float:
    """Return the mean over all positions of bins ``(start, end, mean)``."""
    return sum((end - start) * mean for start, end, mean in bins) / sum(end - start for start, end, _ in bins)


def _finish(figure: Figure, *panels: Axes, legend_of: Axes | None = None) -> None:
    for axes in panels:
        axes.set_xlabel("Tokens trained on")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M")
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    handles, labels = (legend_of or panels[0]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _columns(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]
