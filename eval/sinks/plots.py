"""Plots of attention sinks: by head, as attention maps, by layer, and over a run's checkpoints."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plots import COLOURS, MARKERS, STYLE, curve_style, log_scale, save_figure
from .tables import shown_positions

FAINTEST = 1e-3  # smaller attention is drawn as this value
GREY = "0.6"


def plot_sinks(report: dict[str, Any], folder: Path, title: str | None = None) -> list[Path]:
    """Save all plots of a report (see `tables.as_json`) as PNGs and return their paths.

    Without checkpoints in the report, the picture of those of an earlier one is deleted.
    """
    figures = {"heads": heads_figure(report, title), "maps": maps_figure(report, title)}
    figures["layers"] = layers_figure(report, title)
    if report.get("checkpoints"):
        figures["checkpoints"] = checkpoints_figure(report, title)
    else:
        (folder / "sinks-checkpoints.png").unlink(missing_ok=True)
    paths = {name: folder / f"sinks-{name}.png" for name in figures}
    for name, figure in figures.items():
        save_figure(figure, paths[name])
    return list(paths.values())


def heads_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot sink rate and attention of each head, with one row of panels for each named position."""
    positions = shown_positions(report)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 0.6 + 2.0 * len(positions)), layout="constrained")
        panels = figure.subplots(len(positions), 2, sharex=True, sharey=True, squeeze=False)
        for row, name in zip(panels, positions, strict=True):
            for axes, key in zip(row, ("sink_rate", "mass"), strict=True):
                shares = np.array(report["heads"][name][key]).T  # (H, L)
                image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
                what = f"Sink rate (attention > {report['epsilon']:g})" if key == "sink_rate" else "Attention"
                axes.set_title(f"{what}, {name}: {100 * shares.mean():.1f} %", fontsize=9)
                _whole_ticks(axes)
            row[0].set_ylabel("Head")
        for axes in panels[-1]:
            axes.set_xlabel("Layer")
        figure.colorbar(image, ax=panels, shrink=0.9, pad=0.01, label="Share of texts; mean attention")
        _set_title(figure, title)
    return figure


def maps_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot mean attention maps of some layers: all heads (top), strongest head (bottom)."""
    layers = list(dict.fromkeys(found["layer"] for found in report["maps"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 1.65 * len(layers), 4.1), layout="constrained")
        panels = figure.subplots(2, len(layers), sharex=True, sharey=True, squeeze=False)
        for found in report["maps"]:
            axes = panels[int(found["head"] is not None), layers.index(found["layer"])]
            attention = np.array(found["attention"])
            is_seen = np.tri(len(attention), dtype=bool)
            shown = np.ma.masked_where(~is_seen, attention.clip(FAINTEST))
            image = axes.imshow(shown, cmap="magma_r", norm=LogNorm(FAINTEST, 1))
            head = "all heads" if found["head"] is None else f"head {found['head']}"
            axes.set_title(f"layer {found['layer']}, {head}", fontsize=8)
            _whole_ticks(axes)
        first_text = report["positions"]["first text token"]
        for axes in panels[-1]:
            axes.set_xlabel(f"Key position\n(text from {first_text})" if first_text else "Key position")
        for axes in panels[:, 0]:
            axes.set_ylabel("Query position")
        figure.colorbar(image, ax=panels, shrink=0.9, pad=0.01, label="Mean attention (log scale)", format="{x:g}")
        _set_title(figure, title)
    return figure


def layers_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot norms, largest activations and cosines by layer, at named and other positions."""
    positions = {name: k for name, k in report["positions"].items() if k >= 0}
    layers = {name: np.array(values, dtype=float) for name, values in report["layers"].items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        (hidden, largest), (values, cosines) = figure.subplots(2, 2, sharex=True)
        for axes, key, quantity in (
            (hidden, "hidden_norm", "Mean norm of hidden states"),
            (largest, "largest_activation", "Largest activation"),
            (values, "value_norm", "Mean norm of values"),
        ):
            _draw_positions(axes, layers[key], positions)
            axes.set_ylabel(quantity)
        median = largest.plot(layers["median_activation"], color=GREY, linestyle="--", label="median activation")
        largest.legend(handles=median, fontsize=7, handlelength=2.5)
        for axes in (hidden, largest):
            log_scale(axes)
        cosines.plot(layers["key_cosine"][:, 1:].mean(1), color=GREY, label="other keys with the first key")
        if np.isfinite(layers["query_cosine"]).all():
            others = layers["query_key_cosine"][:, 1:].mean(1)
            cosines.plot(layers["query_cosine"].mean(1), color=COLOURS[1], label="queries with the first key")
            cosines.plot(others, color=COLOURS[1], linestyle=":", label="queries with other keys")
        cosines.set_ylabel("Mean cosine similarity")
        cosines.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        cosines.set_ylim(top=1.1)  # room for the legend
        for axes in (hidden, cosines):
            axes.legend(fontsize=7, handlelength=2.5)
        for axes in (hidden, largest, values, cosines):
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        for axes in (values, cosines):
            axes.set_xlabel("Layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
        _set_title(figure, title)
    return figure


def checkpoints_figure(report: dict[str, Any], title: str | None = None) -> Figure:
    """Plot sink rate and attention against the step of a run's checkpoints."""
    checkpoints = report["checkpoints"]
    steps = [checkpoint["step"] for checkpoint in checkpoints]
    last = checkpoints[-1]
    has_log_scale = _num_log_ticks(steps) > 1
    notes = ["log scale"] if has_log_scale else []
    notes += [f"{last['tokens'] / last['step']:,.0f} tokens per step"] if last["step"] else []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        rates, masses = figure.subplots(1, 2)
        for i, name in enumerate(shown_positions(report)):
            style = curve_style(i + 1, 1 + len(shown_positions(report)))
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            for axes, key in ((rates, "sink_rate"), (masses, "mass")):
                shares = [100 * checkpoint[key][name] for checkpoint in checkpoints]
                axes.plot(steps, shares, label=name, clip_on=False, **style)  # whole markers at the edges
        rates.set_ylabel(f"Heads with attention > {report['epsilon']:g} (%)")
        masses.set_ylabel("Mean attention (%)")
        for axes in (rates, masses):
            if len(steps) == 1:
                axes.set_xticks(steps)
            elif has_log_scale:
                axes.set_xscale("symlog", linthresh=1)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_xlabel(f"Step ({'; '.join(notes)})" if notes else "Step")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        masses.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _set_title(figure, title)
    return figure


def _num_log_ticks(steps: list[int]) -> int:
    """Return how many of step 0 and the powers of ten are between the first and the last step."""
    return sum(steps[0] <= tick <= steps[-1] for tick in (0, *(10**k for k in range(len(str(steps[-1]))))))


def _draw_positions(axes: Axes, values: np.ndarray, positions: dict[str, int]) -> None:
    """Draw a line over layers for each named position, and the mean and range of all others."""
    others = np.delete(values, list(positions.values()), axis=1)  # (L, T - named)
    layers = range(len(values))
    axes.fill_between(layers, others.min(1), others.max(1), color=GREY, alpha=0.25, linewidth=0)
    axes.plot(layers, others.mean(1), color=GREY, label="other positions")
    for i, (name, k) in enumerate(positions.items()):
        axes.plot(layers, values[:, k], label=name, **curve_style(i + 1, 1 + len(positions)))


def _whole_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _set_title(figure: Figure, title: str | None) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
