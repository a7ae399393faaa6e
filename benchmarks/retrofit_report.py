"""The tables and the answer of retrofit_study.py, from its retrofit.json.

python benchmarks/retrofit_report.py results/retrofit/retrofit.json
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
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
    """Compare the runs with a sink with vanilla.

    Raises:
        ValueError: runs were trained on other data or measured on other texts.
    """
    runs = found["runs"]
    for key in ("data_fingerprint", "text"):
        if len({json.dumps(run[key]) for run in runs}) > 1:
            raise ValueError(f"the runs differ in {key}, so they cannot be compared: use another folder")
    plain = {(run["lr"], run["seed"]): run["checkpoints"] for run in runs if run["row"] == "plain"}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        if run["row"] != "plain":
            groups.setdefault((run["row"], run["is_frozen"], run["lr"]), []).append(run)
    return [compared(group, plain, found["settings"]["window"]) for group in groups.values() if plain]


def compared(group: list[dict[str, Any]], plain: dict, window: int) -> Configuration:
    """Compare the seeds of a configuration with the vanilla models that there are of each."""
    row, is_frozen, lr = (group[0][key] for key in ("row", "is_frozen", "lr"))
    steps = sorted(set.intersection(*(set(run["checkpoints"]) for run in group)), key=int)
    untouched = next(iter(plain.values()))["0"]
    references: dict[str, list[dict[str, Any]]] = {UNTOUCHED: [dict.fromkeys(steps, untouched)] * len(group)}
    continued = [plain.get((lr, run["seed"])) for run in group]
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


def report(found: dict[str, Any]) -> str:
    """Return the answer and the tables in Markdown."""
    ready = configurations(found)
    if not ready:
        return "No configuration was measured yet.\n\n"
    parts = [
        answer(ready, found["settings"]["window"]),
        summary(ready),
        *(by_tokens(ready, name) for name in (UNTOUCHED, CONTINUED)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def answer(ready: Iterable[Configuration], window: int) -> str:
    """Return a sentence on the configuration that needs the fewest tokens; then the least loss."""
    ready = list(ready)
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
    ready = [each for each in ready if reference in each.excess]
    columns = sorted({tokens for each in ready for tokens in each.tokens})
    rows = []
    for each in ready:
        cells = dict(zip(each.tokens, each.excess[reference], strict=True))
        shown = [mean_and_error(cells.get(tokens, []), 2, "+") for tokens in columns]
        rows.append([f"{each.row}, {each.weights}, {each.lr}", *shown])
    return table([f"1+N over 4+N, {reference}, %", *map(in_words, columns)], rows)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
