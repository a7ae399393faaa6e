"""The results of windows_study.py: grouped by model, by the size of the cache, and by position."""

import json
import re
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from sinklm.train.windows import layer_kinds

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from seed_tables import mean_and_error

REFERENCE = "full"  # the run with which the others are compared
NUM_LAST_POINTS = 10  # of the 200 of a training curve, for the loss at its end
TRAINING_HEADERS = ("M tokens", "training loss", "validation loss", "tokens/s", "memory, GiB")

Run = dict[str, Any]
Runs = dict[str, Run]  # results by the name of the run
Models = dict[str, list[Run]]  # the results of all seeds of a model


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
    """Group the seeds of each model, the reference first.

    Seeds that are unfinished are left out if one is finished. Otherwise the name tells it.
    """
    models: Models = {}
    for name in sorted(runs, key=lambda name: (not name.startswith(REFERENCE), name)):
        models.setdefault(re.sub(r"-seed-\d+$", "", name), []).append(runs[name])
    finished = {name: [run for run in model if run["is_finished"]] for name, model in models.items()}
    return {name if finished[name] else f"{name} (unfinished)": finished[name] or models[name] for name in models}


def kept_by(run: Run) -> int:
    """Return the kept tokens of the caches in which a model is compared with others: as trained."""
    num_kept = run["config"]["model"]["attention"]["num_kept"]
    return run["num_sinks"] if num_kept is None else num_kept


def seen(run: Run, num_kept: int, window: int) -> tuple[int, int]:
    """Return what a model sees of a cache S+W: no more than its windows if all layers have one."""
    settings = run["config"]["model"]
    own = settings["attention"]["window"]
    if "full" in layer_kinds(settings["attention"]["pattern"], settings["num_hidden_layers"]):
        return num_kept, window
    return min(num_kept, kept_by(run)), min(window, own[-1] if isinstance(own, list) else own)


def windows_of(run: Run) -> str:
    """Describe the windows of the training: "none", "255 in 6 of 8 layers"."""
    settings = run["config"]["model"]
    kinds = layer_kinds(settings["attention"]["pattern"], settings["num_hidden_layers"])
    if "window" not in kinds:
        return "none"
    own, num_windowed = settings["attention"]["window"], kinds.count("window")
    windows = f"drawn from {own[0]:,} to {own[1]:,}" if isinstance(own, list) else f"{own:,}"
    return windows if num_windowed == len(kinds) else f"{windows} in {num_windowed} of {len(kinds)} layers"


def training_cells(model: list[Run]) -> list[str]:
    """Return the cells of `TRAINING_HEADERS` for the seeds of a model."""
    read = mean_and_error([fmean(loss for _, loss in run["loss"][-NUM_LAST_POINTS:]) for run in model], 4)
    last = mean_and_error([run["validation_loss"][-1][1] for run in model if run["validation_loss"]], 4)
    tokens = fmean(run["tokens"] for run in model) / 1e6
    speed = mean_and_error([run["tokens_per_second"] for run in model], 0)
    memory = max(run["memory_gib"] for run in model)
    return [f"{tokens:,.0f}", read, last, speed, f"{memory:.1f}"]


def cache_of(name: str) -> tuple[int, int]:
    """Return S and W of "S+W"."""
    num_kept, window = map(int, name.split("+"))
    return num_kept, window


def measured(model: Iterable[Run], what: str = "perplexity") -> dict[tuple[int, int], list[Any]]:
    """Return the measurements of each seed by ``(S, W)`` of the cache.

    Caches that were not measured with every seed are left out, because their means would be those
    of other runs.
    """
    found: dict[tuple[int, int], list[Any]] = {}
    runs = [run for run in model if run.get(what)]
    for run in runs:
        for name, value in run[what].items():
            found.setdefault(cache_of(name), []).append(value)
    return {cache: values for cache, values in sorted(found.items()) if len(values) == len(runs)}


def own_caches(model: list[Run]) -> list[tuple[int, int]]:
    """Return the measured caches that keep as many tokens as in the training."""
    return [cache for cache in measured(model) if cache[0] == kept_by(model[0])]


def curve(model: list[Run], what: str = "perplexity") -> dict[int, list[Any]]:
    """Return the measurements of each seed by the number of tokens that the model sees of a cache.

    The caches keep as many tokens as in the training. Larger caches than the model's own windows
    are the same cache, and count once.
    """
    found: dict[int, list[Any]] = {}
    for cache, values in measured(model, what).items():
        if cache[0] == kept_by(model[0]):
            found.setdefault(sum(seen(model[0], *cache)), values)
    return found


def means(model: list[Run]) -> dict[int, float]:
    return {size: fmean(values) for size, values in curve(model).items()}


def nominal_means(model: list[Run]) -> dict[int, float]:
    """Return the mean perplexity by the size of the cache, whatever the model sees of it."""
    values = measured(model)
    return {sum(cache): fmean(values[cache]) for cache in own_caches(model)}


def largest_binned(model: list[Run]) -> list[list[float]]:
    """Return the mean losses of the bins of positions of each seed, in the largest cache."""
    found = curve(model, "binned_losses")
    return found[max(found)] if found else []


def over_seeds(values: list[list[float]]) -> list[float]:
    """Return the means of lists of the same length, one for each seed."""
    return [fmean(column) for column in zip(*values, strict=True)]


def edges_of(models: Models, what: str = "text") -> list[int]:
    """Return the edges of the bins of positions, which all runs share; empty if there are none."""
    return next((run[what]["bin_edges"] for model in models.values() for run in model if what in run), [])


def octaves(edges: list[int], first: int) -> list[tuple[int, int]]:
    """Return ranges of positions: the first ones, and each doubling after them."""
    found = [(0, first)]
    while edges and found[-1][1] < edges[-1]:
        found.append((found[-1][1], 2 * found[-1][1]))
    return [(begin, end) for begin, end in found if any(begin <= edge < end for edge in edges[:-1])]


def by_octave(edges: list[int], losses: list[float], first: int) -> list[float]:
    """Return the mean loss in each of `octaves`, from those in the bins of positions."""
    bins = [(a, b - a, loss) for (a, b), loss in zip(pairwise(edges), losses, strict=True)]
    found = []
    for begin, end in octaves(edges, first):
        inside = [(width, loss) for a, width, loss in bins if begin <= a < end]
        found.append(sum(width * loss for width, loss in inside) / sum(width for width, _ in inside))
    return found
