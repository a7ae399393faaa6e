"""Write the tables and the picture of docs/results/recall.md from the results of recall_study.py.

    python benchmarks/recall_report.py recall-study   # take its recall.json and recall-words.json
    python benchmarks/recall_report.py                # draw again from docs/results/recall.json

Accuracy is exact match in percent, ± one standard error over questions. The accuracy over several
distances is the mean of their accuracies. A cache holds the line that is D lines back if D + 2
lines fit its window: this line, the D lines after it, and the question.
"""

import sys
from collections.abc import Iterable
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from windows_results import TRAINING_HEADERS, training_cells, windows_of

from sinklm.eval.plots import COLOURS, DASHES, STYLE, save_figure, short_number

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page, read, rounded
from seed_tables import table

PAPER_DISTANCE = 20  # in lines, of the paper's Figure 9
DENSE = "dense"
FIRST_OCTAVE = 1024  # tokens read, the end of the first column along a stream

Result = dict[str, Any]  # of a model with a cache
Results = dict[str, Result]  # by the name of the cache: `dense`, 0+N, S+W


class Score(NamedTuple):
    """A share of right answers and its variance."""

    accuracy: float
    variance: float

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * sqrt(self.variance):.2f}"


def main() -> None:
    found, folder = make_page("recall", __doc__, tables, collect)
    save_figure(picture(found["models"]), folder / "recall.png")


def collect(folder: Path) -> dict[str, Any]:
    """Return the results of recall_study.py, and of recall_words.py if it has run."""
    found = read(folder / "recall.json", "run recall_study.py", parse_float=rounded)
    if (of_words := folder / "recall-words.json").exists():
        found["words"] = read(of_words, "run recall_words.py again")
    else:
        print(f"{of_words} does not exist: run recall_words.py for the table of words")
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    made = {make.__name__: make(found["models"]) for make in (answer, distances, stream)}
    return made | {"words": words(found.get("words", {})), "training": training(found["runs"])}


# -- What was measured --------------------------------------------------------------------------


def score(accuracy: float, num_questions: int) -> Score:
    """Return a score with the variance for one more right and one more wrong answer.

    Otherwise the error of 100 right answers of 100 would be 0.
    """
    share = (accuracy * num_questions + 1) / (num_questions + 2)
    return Score(accuracy, share * (1 - share) / num_questions)


def mean_of(scores: Iterable[Score]) -> Score | None:
    """Return the mean of independent scores, each with the same weight; None without any."""
    scores = list(scores)
    if not scores:
        return None
    return Score(fmean(s.accuracy for s in scores), sum(s.variance for s in scores) / len(scores) ** 2)


def size_of(result: Result) -> int:
    """Return the tokens in a cache."""
    return result["num_kept"] + result["window"]


def holds(result: Result, distance: int) -> bool:
    """Whether the line is in the cache when its question has been read."""
    return (distance + 2) * result["tokens_per_line"] <= result["window"]


def held(result: Result) -> list[int]:
    return [distance for distance in by_distance(result) if holds(result, distance)]


def sizes_of(results: Results) -> dict[int, tuple[Result | None, Result]]:
    """Return the results of the caches 0+N, None if not measured, and S+W of each size."""
    bounded = [result for name, result in results.items() if name != DENSE]
    without = {size_of(result): result for result in bounded if result["num_kept"] == 0}
    kept = {size_of(result): result for result in bounded if result["num_kept"] > 0}
    return {size: (without.get(size), kept[size]) for size in sorted(kept)}


def parts_between(result: Result, start: float, end: float) -> list[dict[str, Any]]:
    """Return the parts of a stream that end after ``start`` and until ``end`` tokens."""
    return [part for part in result["parts"] if start < part["num_tokens"] <= end]


def score_of(result: Result, wanted: Iterable[int], start: float = 0, end: float = float("inf")) -> Score | None:
    """Return the mean accuracy at distances in a range of tokens read; None without a question."""
    scores = []
    for distance in map(str, wanted):
        parts = [part for part in parts_between(result, start, end) if distance in part["accuracy"]]
        if places := sum(part["num_places"] for part in parts):
            mean = sum(part["accuracy"][distance] * part["num_places"] for part in parts) / places
            scores.append(score(mean, places * result["num_samples"]))
    return mean_of(scores)


def by_distance(result: Result) -> dict[int, Score]:
    """Return the accuracy at each distance, over all places."""
    return {each["lines"]: score(each["accuracy"], each["num_questions"]) for each in result["distances"]}


def along_stream(result: Result) -> list[int]:
    """Return the distances of which the accuracy by tokens read is known."""
    return [int(distance) for distance in result["parts"][-1]["accuracy"]]


def octaves(results: Iterable[Result]) -> list[int]:
    """Return ends of ranges of tokens read: powers of two, and the end of the longest stream."""
    last = max((result["parts"][-1]["num_tokens"] for result in results), default=0)
    found = [FIRST_OCTAVE]
    while found[-1] < last:
        found.append(2 * found[-1])
    return [*found[:-1], ceil(last)]


# -- Tables -------------------------------------------------------------------------------------


def answer(models: dict[str, Results]) -> str:
    """Accuracy at the distances that a cache S+W holds, over the stream and compared with 0+N."""
    rows = []
    for name, results in models.items():
        for without, kept in sizes_of(results).values():
            lines = held(kept)
            if lines:
                along = max(set(lines) & set(along_stream(kept)), default=None)
                later = [
                    result and along is not None and score_of(result, [along], start=2 * size_of(kept))
                    for result in (kept, without)
                ]
                overall = mean_of(found for distance, found in by_distance(kept).items() if distance in lines)
                cells = [f"{min(lines)} to {max(lines)}", overall]
                cells += ["", ""] if along is None else [f"{along}", change(kept, [along])]
                cells += later
                rows.append([f"{name}, {kept['configuration']}", *(str(cell or "") for cell in cells)])
    headers = ["", "lines back", "accuracy", "lines back, along the stream"]
    changed = "change from the first octave to the last"
    return table([*headers, changed, "S+W, after 2N tokens", "0+N, after 2N tokens"], rows)


def change(result: Result, lines: list[int]) -> str:
    """Format the difference of the last octave of a stream and the first; empty if it has one."""
    found = [score_of(result, lines, *edges) for edges in pairwise([0, *octaves([result])])]
    asked = [each for each in found if each is not None]
    if len(asked) < 2:
        return ""
    first, last = asked[0], asked[-1]
    points = round(100 * (last.accuracy - first.accuracy), 1) + 0.0  # without the sign of -0.0
    text = f"{points:+.1f} ± {100 * sqrt(last.variance + first.variance):.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def distances(models: dict[str, Results]) -> str:
    """Accuracy by distance over the whole stream, bold where the cache holds the line."""
    lines = sorted(
        {distance for results in models.values() for result in results.values() for distance in by_distance(result)}
    )
    rows, variances = [], [0.0]
    for name, results in models.items():
        for cache, result in results.items():
            scores = by_distance(result)
            variances += [each.variance for each in scores.values()]
            cells = {line: f"{100 * each.accuracy:.1f}" for line, each in scores.items()}
            cells |= {line: f"**{cells[line]}**" for line in held(result)}
            rows.append([f"{name}, {cache_name(cache, result)}", *(cells.get(line, "") for line in lines)])
    note = f"Bold: the cache holds the line. Standard errors are at most {100 * sqrt(max(variances)):.1f} points."
    return f"{table(['lines back', *map(str, lines)], rows)}\n\n{note}" if rows else ""


def cache_name(cache: str, result: Result) -> str:
    return f"{DENSE}, to {size_of(result):,} tokens" if cache == DENSE else cache


def stream(models: dict[str, Results]) -> str:
    """Accuracy by tokens read, at the paper's distance in the smallest cache that holds it."""
    kept = [pair[1] for results in models.values() for pair in sizes_of(results).values()]
    lines = [d for result in kept for d in held(result) if d <= PAPER_DISTANCE and d in along_stream(result)]
    if not lines:
        return ""
    distance = max(lines)
    size = min(size_of(result) for result in kept if distance in held(result))
    chosen = {
        f"{name}, {cache}": result
        for name, results in models.items()
        for cache, result in results.items()
        if cache == DENSE or size_of(result) == size
    }
    edges = [0, *octaves(chosen.values())]
    rows = []
    for name, result in chosen.items():
        found = [score_of(result, [distance], *edge) for edge in pairwise(edges)]
        rows.append([name, *(str(each or "") for each in found)])
    return table([f"{distance} lines back, tokens read", *(f"to {edge:,}" for edge in edges[1:])], rows)


def words(found: dict[str, Any]) -> str:
    """Accuracy in records like those of StreamEval, in its words and in others."""
    rows = [
        [f"{name}, {changed}", *(f"{share:.0f}" for share in shares.values())]
        for name, variants in found.get("models", {}).items()
        for changed, shares in variants.items()
    ]
    return table(["lines back", *found["distances"]], rows) if rows else ""


def training(runs: dict[str, dict[str, Any]]) -> str:
    """Losses and speed of the trainings."""
    rows = []
    for name, run in runs.items():
        label = name if run["is_finished"] else f"{name} (unfinished)"
        rows.append([label, windows_of(run), f"{run['config']['train']['num_steps']:,}", *training_cells([run])])
    return table(("", "windows", "steps", *TRAINING_HEADERS), rows)


# -- The picture --------------------------------------------------------------------------------


def picture(models: dict[str, Results]) -> Figure:
    """Plot accuracy against tokens read, a panel for each model.

    The distance is the longest one that all caches with kept tokens hold, without those that hold
    none.
    """
    kept = [pair[1] for results in models.values() for pair in sizes_of(results).values()]
    shown = [lines for result in kept if (lines := set(held(result)) & set(along_stream(result)))]
    distance = max(set.intersection(*shown), default=0) if shown else 0
    sizes = sorted({size_of(result) for result in kept})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 2.8 * len(models), 3.2), layout="constrained")
        panels = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, results) in zip(panels, models.items(), strict=True):
            draw(axes, results, distance, sizes)
            axes.set_title(name, fontsize=9)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
            axes.set_xlabel("Tokens read (log scale)")
            axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        panels[0].set_ylabel(f"Exact match, {distance} lines back (%)")
        panels[0].set_ylim(-3, 103)
        most = max(panels, key=lambda axes: len(axes.lines))
        figure.legend(*most.get_legend_handles_labels(), loc="outside right upper")
    return figure


def draw(axes: Axes, results: Results, distance: int, sizes: list[int]) -> None:
    """Draw the curves of a model: a colour for each of all sizes, dashed without kept tokens."""
    for size, (without, kept) in sizes_of(results).items():
        i = sizes.index(size)  # later curves are drawn over earlier ones, and are narrower
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        style = {"color": colour, "linewidth": max(1.0, 3.0 - 0.8 * i)}
        plot(axes, kept, distance, label=f"S+W, {size:,} tokens", **style)
        if without:
            plot(axes, without, distance, label=f"0+N, {size:,} tokens", linestyle=DASHES[1], color=colour)
    if DENSE in results:
        plot(axes, results[DENSE], distance, label="dense", color=COLOURS[0], linestyle=DASHES[2])


def plot(axes: Axes, result: Result, distance: int, **style: Any) -> None:
    parts = [part for part in result["parts"] if str(distance) in part["accuracy"]]
    axes.plot(
        [part["num_tokens"] for part in parts], [100 * part["accuracy"][str(distance)] for part in parts], **style
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
