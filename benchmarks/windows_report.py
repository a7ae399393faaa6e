"""Write the tables and the picture of docs/results/windows.md from the results of windows_study.py.

    python benchmarks/windows_report.py windows   # collect windows/results, and draw
    python benchmarks/windows_report.py           # draw again from docs/results/windows.json

Runs that differ by their seed are one row: the mean, and its standard error if there are several.
Models are compared in caches that keep as many tokens as they were trained to keep.
"""

import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import exp, log2
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from windows_results import (
    REFERENCE,
    TRAINING_HEADERS,
    Models,
    Run,
    by_model,
    by_octave,
    collect,
    curve,
    edges_of,
    largest_binned,
    means,
    measured,
    nominal_means,
    octaves,
    over_seeds,
    own_caches,
    seen,
    training_cells,
    windows_of,
)

from sinklm.eval.compare import stderr_of_mean
from sinklm.eval.plots import STYLE, curve_style, log_scale, save_figure, short_number

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page
from seed_tables import mean_and_error, table

FIRST_POSITIONS = 64  # the first point of the curves by position
LIMITED = "In brackets: what all layers of the model see of the cache, because of their own windows."


def main() -> None:
    found, folder = make_page("windows", __doc__, tables, lambda folder: {"runs": collect(folder)})
    save_figure(picture(by_model(found["runs"])), folder / "windows.png")


def tables(found: dict[str, Any]) -> dict[str, str]:
    models = by_model(found["runs"])
    parts = (answer, doublings, worse, caches, relative, kept, positions, pieces, training, sinks)
    return {make.__name__: make(models) for make in parts}


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %".replace("-", "\N{MINUS SIGN}")


def differences(values: Iterable[float], others: Iterable[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def first_octave(models: Models) -> int:
    """Return half the trained length: the tables begin with the mean loss up to this position."""
    return next((run["config"]["train"]["seq_length"] // 2 for model in models.values() for run in model), 0)


def labels_of(edges: list[int], first: int) -> list[str]:
    return [f"to {end:,}" for _, end in octaves(edges, first)]


# -- Tables: the answer -------------------------------------------------------------------------


def answer(models: Models) -> str:
    """The number of tokens in the cache for the same perplexity as the reference."""
    reference = means(models.get(REFERENCE, []))
    rows = []
    for name, model in models.items():
        own = means(model)
        if own and reference and name != REFERENCE:
            rows.append((name, *(size_for(own, value, size) for size, value in reference.items())))
    return table((f"same perplexity as {REFERENCE} with", *(f"{size:,}" for size in reference)), rows)


def size_for(own: dict[int, float], wanted: float, compared: int) -> str:
    """Return the size at which a curve first reaches a perplexity, on a logarithmic scale.

    Args:
        compared: size to which it is compared.
    """
    smallest = next(iter(own))
    if own[smallest] <= wanted:
        return f"≤ {smallest:,}"
    for (a, high), (b, low) in pairwise(own.items()):
        if low <= wanted < high:
            size = 2 ** (log2(a) + (log2(b) - log2(a)) * (high - wanted) / (high - low))
            return f"{size:,.0f} ({size / compared:.2f} ×)"
    return "none"


def rises(own: dict[int, float]) -> list[tuple[int, int]]:
    """Return each size that is not better than all smaller ones, after the best of these."""
    sizes = list(own)
    best = [min(sizes[:i], key=own.__getitem__) for i in range(1, len(sizes))]
    return [(smaller, size) for smaller, size in zip(best, sizes[1:], strict=True) if own[size] >= own[smaller]]


def doublings(models: Models) -> str:
    """Whether a larger cache always helps, and the best one of each model."""
    reference = means(models.get(REFERENCE, []))
    rows = []
    for name, model in models.items():
        own = means(model)
        if not own:
            continue
        found = [f"{size:,} ({percent(own[size] / own[smaller])} from {smaller:,})" for smaller, size in rises(own)]
        best = min(own, key=own.__getitem__)
        against = [percent(own[best] / reference[min(reference, key=reference.__getitem__)])] if reference else []
        range_of_sizes = f"{min(own):,} to {max(own):,}"
        rows.append((name, range_of_sizes, "no: " + ", ".join(found) if found else "yes", f"{best:,}", *against))
    headers = ["", "tokens in the cache", "each larger one is better", "best"]
    return table([*headers, f"there against the best of {REFERENCE}"] if reference else headers, rows)


def worse(models: Models) -> str:
    """Where perplexity does not fall from the best smaller cache to a larger one."""
    edges, first = edges_of(models), first_octave(models)
    rows, labels = [], labels_of(edges, first)
    for name, model in models.items():
        own, binned, texts = means(model), curve(model, "binned_losses"), curve(model, "text_losses")
        for smaller, size in rises(own):
            row = [f"{name}, {smaller:,} to {size:,}", percent(own[size] / own[smaller]), "", "", *[""] * len(labels)]
            if smaller in texts and size in texts:
                changes = differences(over_seeds(texts[size]), over_seeds(texts[smaller]))
                error = stderr_of_mean(changes)
                row[2] = "" if error is None else f"{100 * error:.2f} %"
                row[3] = f"{sum(change > 0 for change in changes)} of {len(changes)}"
            if smaller in binned and size in binned:
                changes = differences(*(by_octave(edges, over_seeds(binned[key]), first) for key in (size, smaller)))
                row[4:] = [percent(exp(change)) for change in changes]
            rows.append(row)
    if not rows and any(map(means, models.values())):
        return "Every larger cache is better than all smaller ones."
    return table(["", "change", "standard error over texts", "texts that are worse", *labels], rows)


# -- Tables: the measurements -------------------------------------------------------------------


def caches(models: Models) -> str:
    """Perplexity by the size of the cache."""
    found = {name: {sum(cache): cache for cache in own_caches(model)} for name, model in models.items()}
    sizes = sorted({size for own in found.values() for size in own})
    rows = [
        (name, *(perplexity_cell(models[name], own.get(size)) for size in sizes)) for name, own in found.items() if own
    ]
    return with_note(table(("tokens in the cache", *(f"{size:,}" for size in sizes)), rows))


def perplexity_cell(model: list[Run], cache: tuple[int, int] | None) -> str:
    """Format a perplexity, and in brackets the cache that the model sees if it is a smaller one."""
    values = {} if cache is None else measured(model)
    if cache is None or cache not in values:
        return ""
    limited = seen(model[0], *cache)
    return mean_and_error(values[cache], 2) + ("" if limited == cache else f" ({limited[0]}+{limited[1]})")


def with_note(text: str) -> str:
    return f"{text}\n\n{LIMITED}" if "(" in text.replace("(unfinished)", "") else text


def relative(models: Models) -> str:
    """Perplexity relative to the reference in a cache of the same size, in percent."""
    reference = nominal_means(models.get(REFERENCE, []))
    found = {name: nominal_means(model) for name, model in models.items() if name != REFERENCE}
    rows = [
        (name, *(percent(own[size] / value) if size in own else "" for size, value in reference.items()))
        for name, own in found.items()
        if own and reference
    ]
    return table((f"perplexity relative to {REFERENCE}", *(f"{size:,}" for size in reference)), rows)


def kept(models: Models) -> str:
    """Perplexity by the number of kept tokens, in the smallest, a middle and the largest cache."""
    found = sorted({cache for model in models.values() for cache in measured(model)})
    sizes = sorted({sum(cache) for cache in found})
    shown = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) if sizes else []
    columns = [cache for size in shown for cache in found if sum(cache) == size]
    rows = [
        (name, *(perplexity_cell(model, cache) for cache in columns))
        for name, model in models.items()
        if measured(model)
    ]
    return with_note(table(("cache", *(f"{n}+{window}" for n, window in columns)), rows))


def positions(models: Models) -> str:
    """Perplexity by position in the text, in the largest cache."""
    rows, edges, first = [], edges_of(models), first_octave(models)
    for name, model in models.items():
        if losses := largest_binned(model):
            found = [by_octave(edges, each, first) for each in losses]  # of each seed
            rows.append((name, *(mean_and_error(list(map(exp, each)), 2) for each in zip(*found, strict=True))))
    return table(("tokens of the text", *labels_of(edges, first)), rows)


def pieces(models: Models) -> str:
    """Perplexity by position in pieces of one trained length, in one pass as in training."""
    rows, edges = [], edges_of(models, "pieces")
    for name, model in models.items():
        found = [by_octave(edges, run["pieces"]["binned_losses"], FIRST_POSITIONS) for run in model if "pieces" in run]
        if found:
            rows.append((name, *(mean_and_error(list(map(exp, each)), 2) for each in zip(*found, strict=True))))
    return table(("tokens of a piece", *labels_of(edges, FIRST_POSITIONS)), rows)


def training(models: Models) -> str:
    """Losses, speed, and whether the model streams as it was trained."""
    rows = []
    for name, model in models.items():
        both = [run["pieces"] for run in model if "pieces" in run]
        streamed = mean_and_error([losses["streamed"] - losses["loss"] for losses in both], 4, "+")
        rows.append((name, windows_of(model[0]), f"{len(model)}", *training_cells(model), streamed))
    headers = ("", "windows", "seeds", *TRAINING_HEADERS, "loss streamed, over that of one pass")
    return table(headers, rows)


def sinks(models: Models) -> str:
    """Share of heads with a sink at the first positions, in percent."""
    rows = []
    for name, model in models.items():
        rates = [run["sinks"]["sink_rate"] for run in model if "sinks" in run]
        if rates:
            tokens = [[v for place, v in rate.items() if place.startswith("sink token")] for rate in rates]
            columns = [[sum(each) for each in tokens if each]]  # none: the model has no sink token
            columns += [[rate[place] for rate in rates] for place in ("first text token", "no token")]
            rows.append((name, *(mean_and_error([100 * v for v in column], 1) for column in columns)))
    return table(("heads with a sink, %", "sink token", "first text token", "no token"), rows)


# -- The picture --------------------------------------------------------------------------------


def picture(models: Models) -> Figure:
    """Plot perplexity by the size of the cache, and relative to the reference, also by position.

    Without the reference there is only the first panel.
    """
    reference = means(models.get(REFERENCE, []))
    binned = {name: over_seeds(losses) for name, model in models.items() if (losses := largest_binned(model))}
    edges = edges_of(models)
    by_position = {name: by_octave(edges, losses, FIRST_POSITIONS) for name, losses in binned.items()}
    ends = [end for _, end in octaves(edges, FIRST_POSITIONS)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0 if reference else 5.0, 3.4), layout="constrained")
        panels = figure.subplots(1, 3 if reference else 1, squeeze=False)[0]
        for i, (name, model) in enumerate(models.items()):
            style = curve_style(i, len(models)) | {"label": name}
            own = means(model)
            panels[0].plot(list(own), list(own.values()), **style)
            if reference:
                both = [size for size in own if size in reference]
                panels[1].plot(both, [100 * (own[size] / reference[size] - 1) for size in both], **style)
            if reference and name in by_position and REFERENCE in by_position:
                changes = differences(by_position[name], by_position[REFERENCE])
                panels[2].plot(ends, [100 * (exp(change) - 1) for change in changes], **style)
        _finish(panels[0], "Tokens in the cache", "Perplexity", log_scale)
        if reference:
            _finish(panels[1], "Tokens in the cache", f"Perplexity relative to {REFERENCE} (%)")
            _finish(panels[2], "Position, largest caches", f"Perplexity relative to {REFERENCE} (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _finish(axes: Axes, x: str, y: str, scale: Callable[[Axes], None] = lambda axes: None) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    scale(axes)
    axes.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
