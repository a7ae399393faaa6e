"""Write the tables and the picture of docs/results/windows.md from the results of windows_study.py.

    python benchmarks/windows_report.py windows   # collect windows/results, and draw
    python benchmarks/windows_report.py           # draw again from docs/results/windows.json

Each table replaces the one between its marks in the page, `<!-- NAME -->` and `<!-- end -->`; the
text around the tables is written by hand. Runs that differ by their seed are one row: the mean, and
the standard deviation if there are several.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import exp, log2
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinklm.eval.plots import STYLE, curve_style, log_scale, save_figure

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from report import read_runs, write_page
from seed_tables import table

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
REFERENCE = "full"  # the run with which the others are compared
RISE = 1.001  # a larger cache "helps" unless its perplexity is higher by this factor

Runs = dict[str, dict[str, Any]]  # results by the name of the run
Models = dict[str, list[dict[str, Any]]]  # the results of all seeds of a model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    data = arguments.output / "windows.json"
    models = by_model(read_runs(data, arguments.folder, lambda folder: {"runs": collect(folder)}))
    tables = {make.__name__: make(models) for make in (answer, caches, kept, positions, training, sinks)}
    for name, text in tables.items():
        print(f"{name}\n{text}\n")
    write_page(arguments.output / "windows.md", tables)
    save_figure(picture(models), arguments.output / "windows.png")


def collect(folder: Path) -> Runs:
    """Return the results of all runs of a folder by name.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a run read other data or was measured on other texts.
    """
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder / 'results'} has no results: make them with windows_study.py")
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for key in ("data_fingerprint", "text"):
        values = {name: json.dumps(run[key]) for name, run in runs.items() if key in run}
        if other := [name for name, value in values.items() if value != next(iter(values.values()))]:
            raise ValueError(f"{other[0]} and {next(iter(values))} have another {key}: they cannot be compared")
    return runs


def by_model(runs: Runs) -> Models:
    """Group the seeds of each model, the reference first."""
    models: Models = {}
    for name in sorted(runs, key=lambda name: (not name.startswith(REFERENCE), name)):
        models.setdefault(re.sub(r"-seed-\d+$", "", name), []).append(runs[name])
    return models


def perplexities(model: Iterable[dict[str, Any]], num_kept: int | None = None) -> dict[int, list[float]]:
    """Return the perplexities of each seed by the size of the cache.

    Sizes that were not measured with every seed are left out, because their means would be those of
    other runs.

    Args:
        num_kept: of the caches; None: as the model was trained.
    """
    found: dict[int, list[float]] = {}
    runs = [run for run in model if run.get("perplexity")]
    for run in runs:
        wanted = kept_by(run) if num_kept is None else num_kept
        for (first, size), value in zip(cache_sizes(run), run["perplexity"].values(), strict=True):
            if first == wanted:
                found.setdefault(size, []).append(value)
    return {size: values for size, values in sorted(found.items()) if len(values) == len(runs)}


def kept_by(run: dict[str, Any]) -> int:
    """Return the kept tokens of the caches in which a model is compared with others: as trained."""
    num_kept = run["config"]["model"]["attention"]["num_kept"]
    return run["num_sinks"] if num_kept is None else num_kept


def cache_sizes(run: dict[str, Any]) -> list[tuple[int, int]]:
    """Return ``(kept tokens, all tokens)`` of the caches that were measured."""
    pairs = (map(int, cache.split("+")) for cache in run.get("perplexity", {}))
    return [(first, first + recent) for first, recent in pairs]


def caches(models: Models) -> str:
    """Perplexity by the size of the cache, with the sinks kept."""
    sizes = sorted({size for model in models.values() for size in perplexities(model)})
    rows = [
        (name, *(mean_and_deviation(perplexities(model).get(size, []), 2) for size in sizes))
        for name, model in models.items()
    ]
    return table(("", *(f"{size:,}" for size in sizes)), rows)


def kept(models: Models) -> str:
    """Perplexity by the number of kept tokens, in the smallest, a middle and the largest cache."""
    rows, headers = [], [""]
    found = sorted({cache for model in models.values() for run in model for cache in cache_sizes(run)})
    sizes = sorted({size for _, size in found})
    shown = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) if sizes else []
    columns = [(n, size) for size in shown for n in sorted({n for n, _ in found}) if (n, size) in found]
    headers += [f"{n}+{size - n}" for n, size in columns]
    for name, model in models.items():
        cells = (mean_and_deviation(perplexities(model, n).get(size, []), 2) for n, size in columns)
        rows.append((name, *cells))
    return table(headers, rows)


def answer(models: Models) -> str:
    """How small a cache is as good as the reference's, and whether a larger one always helps."""
    reference = means(perplexities(models.get(REFERENCE, [])))
    if not reference:
        return ""
    largest, eighth = max(reference), max((size for size in reference if 8 * size <= max(reference)), default=None)
    headers = ["", f"{largest:,} against {REFERENCE}"]
    headers += [f"same perplexity as {REFERENCE} with {size:,}" for size in (eighth, largest) if size]
    headers += ["larger caches that do not help"]
    rows = []
    for name, model in models.items():
        own = means(perplexities(model))
        if largest not in own:
            continue
        cells = [f"{100 * (own[largest] / reference[largest] - 1):+.2f} %".replace("-", "\N{MINUS SIGN}")]
        cells += [size_for(own, reference[size]) for size in (eighth, largest) if size]
        worse = [f"{b:,}" for a, b in pairwise(own) if own[b] > own[a] * RISE]
        rows.append((name, *cells, ", ".join(worse) or "none"))
    return table(headers, rows)


def means(values: dict[int, list[float]]) -> dict[int, float]:
    return {key: fmean(each) for key, each in values.items()}


def size_for(own: dict[int, float], wanted: float) -> str:
    """Return the size at which a falling curve reaches a perplexity, on a logarithmic scale."""
    if next(iter(own.values())) <= wanted:
        return f"≤ {next(iter(own)):,}"
    for (a, high), (b, low) in pairwise(own.items()):
        if low <= wanted < high:
            return f"{2 ** (log2(a) + (log2(b) - log2(a)) * (high - wanted) / (high - low)):,.0f}"
    return "none"


def positions(models: Models) -> str:
    """Perplexity by position in the text, in the largest cache with the sinks kept."""
    rows, headers = [], []
    for name, model in models.items():
        edges, losses = largest_binned(model)
        if losses:
            octaves = by_octave(edges, losses, model[0]["config"]["train"]["seq_length"])
            headers = ["", *octaves]
            rows.append((name, *(f"{exp(loss):.2f}" for loss in octaves.values())))
    return table(headers, rows)


def largest_binned(model: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return edges of bins of positions, and mean losses over the seeds in the largest cache.

    It is the largest one that was measured with every seed.
    """
    runs = [run for run in model if run.get("binned_losses")]
    common = set.intersection(*(set(run["binned_losses"]) for run in runs)) if runs else set()
    if not common:
        return [], []
    largest = max(common, key=lambda cache: sum(map(int, cache.split("+"))))
    columns = zip(*(run["binned_losses"][largest] for run in runs), strict=True)
    return runs[0]["text"]["bin_edges"], list(map(fmean, columns))


def by_octave(edges: list[int], losses: list[float], length: int) -> dict[str, float]:
    """Return the mean loss of the first half of a trained length, and of each doubling after it."""
    found: dict[str, float] = {}
    begin, end = 0, length // 2
    while begin < edges[-1]:
        inside = [(b - a, loss) for (a, b), loss in zip(pairwise(edges), losses, strict=True) if begin <= a < end]
        if inside:
            total = sum(width for width, _ in inside)
            found[f"to {min(end, edges[-1] + 1):,}"] = sum(width * loss for width, loss in inside) / total
        begin, end = end, 2 * end
    return found


def training(models: Models) -> str:
    """Validation loss and speed."""
    rows = []
    for name, model in models.items():
        last = [run["validation_loss"][-1][1] for run in model if run["validation_loss"]]
        tokens = fmean(run["tokens"] for run in model) / 1e6
        speed = mean_and_deviation([run["tokens_per_second"] for run in model], 0)
        memory = max(run["memory_gib"] for run in model)
        unfinished = "" if all(run["is_finished"] for run in model) else " (unfinished)"
        rows.append((f"{name}{unfinished}", f"{tokens:,.0f}", mean_and_deviation(last, 4), speed, f"{memory:.1f}"))
    return table(("", "M tokens", "validation loss", "tokens/s", "memory, GiB"), rows)


def sinks(models: Models) -> str:
    """Share of heads with a sink at the first positions, in percent."""
    rows = []
    for name, model in models.items():
        measured = [run["sinks"]["sink_rate"] for run in model if "sinks" in run]
        if measured:
            token = [sum(v for place, v in rate.items() if place.startswith("sink token")) for rate in measured]
            others = [[rate[place] for rate in measured] for place in ("first text token", "no token")]
            rows.append((name, *(mean_and_deviation([100 * v for v in column], 1) for column in (token, *others))))
    return table(("", "sink token", "first text token", "no token"), rows)


def picture(models: Models) -> Figure:
    """Plot perplexity by the size of the cache, relative to the reference, and by position."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        absolute, relative, by_position = figure.subplots(1, 3)
        reference = means(perplexities(models.get(REFERENCE, [])))
        for i, (name, model) in enumerate(models.items()):
            style = curve_style(i, len(models)) | {"label": name}
            own = means(perplexities(model))
            absolute.plot(list(own), list(own.values()), **style)
            both = [size for size in own if size in reference]
            relative.plot(both, [100 * (own[size] / reference[size] - 1) for size in both], **style)
            edges, losses = largest_binned(model)
            by_position.plot(edges[1:], [exp(loss) for loss in losses], **style)
        _finish(absolute, "Tokens in the cache", "Perplexity", log_scale)
        _finish(relative, "Tokens in the cache", f"Perplexity relative to {REFERENCE} (%)")
        _finish(by_position, "Position in the text, largest cache", "Perplexity", log_scale)
        figure.legend(*absolute.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _finish(axes: Axes, x: str, y: str, scale: Callable[[Axes], None] = lambda axes: None) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    scale(axes)


def mean_and_deviation(values: list[float], digits: int) -> str:
    """Format the mean of the seeds, and the standard deviation if there are several."""
    if not values:
        return ""
    mean = f"{fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):,.{digits}f}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
