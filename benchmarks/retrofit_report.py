"""Write the tables and the picture of docs/results/retrofit.md, of retrofit_study.py.

    python benchmarks/retrofit_report.py results/retrofit   # take its retrofit.json, and draw
    python benchmarks/retrofit_report.py                    # the one in docs/results again

A sink token "streams as well" at a number of tokens if the mean over seeds of its perplexity in the
cache 1+N, relative to that of the vanilla model in the cache 4+N, is at most 1 % higher there and
at all later checkpoints. Two vanilla models are compared with: the untouched one, and the one that
was continued with the same learning rate, seed and data. Frozen weights are those of the untouched
one.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sinklm.eval.plots import COLOURS, DASHES, STYLE, save_figure

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page
from seed_tables import mean_and_error, table

PERCENT = 1.0  # by which the perplexity of 1+N may be higher than that of 4+N
UNTOUCHED, CONTINUED = "untouched", "continued"


@dataclass(frozen=True)
class Configuration:
    """The runs of a configuration that differ by their seed alone, compared with vanilla.

    Attributes:
        tokens: trained on, of the checkpoints that all seeds have.
        excess: by reference and checkpoint, for each seed: perplexity with 1+N over that of the
            reference with 4+N, in percent more.
        cost: in the same form: loss on held-out text minus that of the reference, in nats.
        sink_rate: at the last checkpoint, of the sink token, for each seed, in percent.
        without: the same for perplexity with 0+N over that with 1+N.
    """

    row: str
    is_frozen: bool
    lr: str
    tokens: list[int]
    excess: dict[str, list[list[float]]]
    cost: dict[str, list[list[float]]]
    sink_rate: list[float]
    without: list[float]

    @property
    def weights(self) -> str:
        return "frozen" if self.is_frozen else "trained"

    def tokens_until(self, reference: str) -> int | None:
        """Return after how many tokens 1+N is, and stays, within 1 %; None: at no checkpoint."""
        first = None
        for tokens, excess in zip(self.tokens, self.excess.get(reference, []), strict=False):
            is_within = fmean(excess) <= PERCENT
            first = (tokens if first is None else first) if is_within else None
        return first

    @property
    def tokens_until_both(self) -> int | None:
        """Return the tokens until both references are reached; None: at least one is not."""
        found = [self.tokens_until(reference) for reference in self.excess]
        return None if None in found or not found else max(found)  # type: ignore[type-var]


def configurations(found: dict[str, Any]) -> list[Configuration]:
    """Compare the runs with a sink with the vanilla models that were trained on the same data.

    Runs of whose data there is no vanilla model yet are left out, with a note.

    Raises:
        ValueError: runs were measured on other texts.
    """
    runs = found["runs"]
    if len({json.dumps(run["text"]) for run in runs}) > 1:
        raise ValueError("the runs differ in text, so they cannot be compared: use another folder")
    plain = [run for run in runs if run["row"] == "plain"]
    data = {run["data_fingerprint"] for run in plain}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if run["row"] != "plain" and run["data_fingerprint"] in data:
            groups.setdefault((run["row"], run["is_frozen"], run["lr"]), []).append(run)
    if num_left_out := len(runs) - len(plain) - sum(map(len, groups.values())):
        print(f"left out: {num_left_out} runs, of whose data there is no vanilla model", file=sys.stderr)
    return [compared(group, plain, found["settings"]["window"]) for group in groups.values()]


def compared(group: list[dict[str, Any]], plain: list[dict[str, Any]], window: int) -> Configuration:
    """Compare the seeds of a configuration with the vanilla models that there are of each."""
    row, is_frozen, lr = (group[0][key] for key in ("row", "is_frozen", "lr"))
    steps = sorted(set.intersection(*(set(run["checkpoints"]) for run in group)), key=int)
    untouched = {run["data_fingerprint"]: run["checkpoints"]["0"] for run in plain}
    references = {UNTOUCHED: [dict.fromkeys(steps, untouched[run["data_fingerprint"]]) for run in group]}
    trained = {(run["data_fingerprint"], run["lr"], run["seed"]): run["checkpoints"] for run in plain}
    continued = [trained.get((run["data_fingerprint"], lr, run["seed"])) for run in group]
    if not is_frozen and all(each is not None and set(steps) <= each.keys() for each in continued):
        references[CONTINUED] = continued  # type: ignore[assignment]
    excess, cost = {}, {}
    for name, each in references.items():
        pairs = [[(run["checkpoints"][s], ref[s]) for run, ref in zip(group, each, strict=True)] for s in steps]
        excess[name] = [[percent_more(own, ref, window) for own, ref in pair] for pair in pairs]
        cost[name] = [[own["loss"] - ref["loss"] for own, ref in pair] for pair in pairs]
    last = [run["checkpoints"][steps[-1]] for run in group]
    rates = [100 * sum(v for k, v in own["sinks"]["sink_rate"].items() if k.startswith("sink token")) for own in last]
    without = [100 * (own["perplexity"][f"0+{window}"] / own["perplexity"][f"1+{window}"] - 1) for own in last]
    tokens = [group[0]["checkpoints"][step]["tokens"] for step in steps]
    return Configuration(row, is_frozen, lr, tokens, excess, cost, rates, without)


def percent_more(own: dict[str, Any], reference: dict[str, Any], window: int) -> float:
    """Return the excess of perplexity with the sink alone over the reference with four tokens."""
    return 100 * (own["perplexity"][f"1+{window}"] / reference["perplexity"][f"4+{window}"] - 1)


def main() -> None:
    found, folder = make_page("retrofit", __doc__, tables)
    save_figure(picture(configurations(found)), folder / "retrofit.png")


def tables(found: dict[str, Any]) -> dict[str, str]:
    ready = configurations(found)
    made = {"answer": answer(ready, found["settings"]["window"]), "summary": summary(ready)}
    return made | {name: by_tokens(ready, name) for name in (UNTOUCHED, CONTINUED)} | {"cost": cost(ready)}


def answer(ready: Iterable[Configuration], window: int) -> str:
    """Return a sentence on the configuration that needs the fewest tokens; then the least loss."""
    if not (ready := list(ready)):
        return ""
    within = [each for each in ready if each.tokens_until_both is not None]
    if not within:
        largest = max(each.tokens[-1] for each in ready)
        return f"After {in_words(largest)} tokens, no configuration has 1+{window} within {PERCENT:g} % of 4+{window}."
    best = min(within, key=lambda each: (each.tokens_until_both, fmean(each.cost[UNTOUCHED][-1])))
    how = f"initial row: {best.row}; other weights: {best.weights}; learning rate {best.lr}"
    when = f"After {in_words(best.tokens_until_both)} tokens"
    if best.tokens_until_both == 0:
        at_once = {each.row for each in within if each.tokens_until_both == 0}
        when, how = "Before any training", f"initial row: {' or '.join(sorted(at_once))}"
    return (
        f"{when}, 1+{window} with the sink token is within {PERCENT:g} % of 4+{window} of the vanilla model ({how}). "
        f"{len(within)} of {len(ready)} configurations reach this and keep it."
    )


def in_words(tokens: int | None) -> str:
    """Format a number of tokens; None is "not reached"."""
    if tokens is None:
        return "not reached"
    return f"{tokens / 1e6:,.3g} M" if tokens >= 1e5 else f"{tokens:,}"


def summary(ready: Iterable[Configuration]) -> str:
    """One row for each configuration; all but the tokens at the last checkpoint."""
    headers = ["initial row", "other weights", "learning rate", "seeds"]
    headers += [f"tokens until within {PERCENT:g} % of {name}" for name in (UNTOUCHED, CONTINUED)]
    headers += [f"over {name}, %" for name in (UNTOUCHED, CONTINUED)]
    headers += [f"loss over {name}" for name in (UNTOUCHED, CONTINUED)]
    rows = []
    for each in ready:
        both = [name if name in each.excess else None for name in (UNTOUCHED, CONTINUED)]
        cells = [each.row, each.weights, each.lr, str(len(each.sink_rate))]
        cells += [in_words(each.tokens_until(name)) if name else "" for name in both]
        cells += [mean_and_error(each.excess[name][-1], 2, "+") if name else "" for name in both]
        cells += [mean_and_error(each.cost[name][-1], 4, "+") if name else "" for name in both]
        rows.append([*cells, mean_and_error(each.sink_rate, 1), mean_and_error(each.without, 1, "+")])
    return table([*headers, "sink rate, %", "0+N over 1+N, %"], rows)


def by_tokens(ready: Iterable[Configuration], reference: str) -> str:
    """Perplexity with 1+N over that of a reference with 4+N, in percent, by tokens."""
    rows = [(each, each.excess[reference]) for each in ready if reference in each.excess]
    return table_by_tokens(f"1+N over 4+N, {reference}, %", rows, 2)


def cost(ready: Iterable[Configuration]) -> str:
    """Loss on held-out text over that of vanilla, continued if there is such a run, by tokens."""
    rows = [(each, each.cost.get(CONTINUED, each.cost[UNTOUCHED])) for each in ready]
    return table_by_tokens("loss over vanilla, nats", rows, 4)


def table_by_tokens(title: str, rows: Iterable[tuple[Configuration, list[list[float]]]], digits: int) -> str:
    """Return a row for each configuration and its values by checkpoint and seed."""
    rows = list(rows)
    columns = sorted({tokens for each, _ in rows for tokens in each.tokens})
    lines = []
    for each, values in rows:
        cells = dict(zip(each.tokens, values, strict=True))
        shown = [mean_and_error(cells.get(tokens, []), digits, "+") for tokens in columns]
        lines.append([f"{each.row}, {each.weights}, {each.lr}", *shown])
    return table([title, *map(in_words, columns)], lines)


def picture(ready: list[Configuration]) -> Figure:
    """Plot perplexity with 1+N over that of a reference with 4+N, as means over seeds, by tokens.

    A panel for each reference of trained weights, and of frozen ones; a colour for each initial
    row, and a dash pattern for each learning rate.
    """
    panels: dict[tuple[str, str], list[Configuration]] = {}
    for name in (UNTOUCHED, CONTINUED):
        for each in ready:
            if name in each.excess:
                panels.setdefault((each.weights, name), []).append(each)
    rows = list(dict.fromkeys(each.row for each in ready))
    legends: dict[str, tuple[list[Line2D], list[str]]] = {}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 2.8 * len(panels), 3.8), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, ((weights, name), shown) in zip(all_axes, panels.items(), strict=True):
            lrs = sorted({each.lr for each in shown}, key=float)
            for each in shown:
                style = {"color": COLOURS[rows.index(each.row)], "linestyle": DASHES[lrs.index(each.lr)]}
                axes.plot(each.tokens, [fmean(excess) for excess in each.excess[name]], **style)
            axes.set_title(f"{weights} weights, over {name} vanilla", fontsize=9)
            lines = [Line2D([], [], color="0.3", linestyle=DASHES[i]) for i in range(len(lrs))]
            legends[f"learning rate, {weights} weights"] = (lines, lrs)
        finish(all_axes, sorted({tokens for each in ready for tokens in each.tokens}))
        legends["initial row"] = ([Line2D([], [], color=COLOURS[i]) for i in range(len(rows))], rows)
        for place, (title, (lines, names)) in zip(("upper", "center", "lower"), legends.items(), strict=False):
            figure.legend(lines, names, title=title, loc=f"outside right {place}", alignment="left")
    return figure


def finish(panels: Sequence[Axes], tokens: list[int]) -> None:
    """Label the axes. They are linear to 1 % and to the first checkpoint after 0 tokens."""
    first, last = tokens[1:2] or [1], tokens[-1]
    powers = [10**n for n in range(12) if first[0] <= 10**n <= last]
    for axes in panels:
        axes.set_xscale("symlog", linthresh=first[0], linscale=0.4)
        axes.set_xlim(-first[0] / 4, last)
        axes.set_xticks([0, *powers], ["0", *(f"{power / 1e6:g}" for power in powers)])
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=PERCENT)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
        axes.set_xlabel("Million tokens trained (log scale)")
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.axhline(PERCENT, color="0.3", linewidth=0.8, zorder=0)
    panels[0].set_ylabel("Perplexity of 1+N above that of 4+N (%)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
