"""Write the tables and figures of docs/results/paper.md from runs and their evaluations.

    python study/report.py runs/study    # collect runs/study into docs/results/paper.json, and draw
    python study/report.py               # draw again from docs/results/paper.json

The arms are in all tables and figures, the deeper models in separate ones; the last table lists
every run.

Figures are docs/results/paper-*.png.
"""

import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from figures import draw
from pages import make_page
from plan import read_plan
from results import above_vanilla, at_place, collect, cost_over_training, sink_rate

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "winogrande")  # Table 4
NEAR = 0.1  # a checkpoint within this share of training represents the end of a quarter
FAINTEST = 1e-3  # attention below this counts as none: rows of an attention map sum to 1 within this tolerance

Runs = dict[str, dict[str, Any]]


def main() -> None:
    found, folder = make_page("paper", __doc__, tables, collect)
    draw(*in_plans(found), folder)


def tables(found: dict[str, Any]) -> dict[str, str]:
    arms, deeper = in_plans(found)
    made = {table.__name__: table(arms) for table in (perplexity, cache_sizes, sinks, activations, zero_shot)}
    made |= {f"deeper_{table.__name__}": table(deeper) for table in (perplexity, sinks, activations)}
    return made | {"tried": tried(arms | deeper | dict(sorted(found["runs"].items())))}


def in_plans(found: dict[str, Any]) -> tuple[Runs, Runs]:
    """Return the arms, and the deeper models, in the order of the plans of this folder."""
    runs = found["runs"]
    plans = (read_plan(Path(__file__).with_name(f"{name}.yaml")) for name in ("arms", "deeper"))
    arms, deeper = ({name: runs[name] for name in plan if name in runs} for plan in plans)
    return arms, deeper


def perplexity(runs: Runs) -> str:
    """The paper's Tables 3 and 10 for the study; cells of caches that were not run are empty."""
    runs = {name: run for name, run in runs.items() if "streaming" in run}
    if not runs:
        return ""
    caches = [cache for cache in next(iter(runs.values()))["streaming"]["perplexity"] if cache != "dense"]
    zero, one, most = caches[0], caches[1], caches[-1]
    headers = ("", "validation loss", "relative to vanilla", *caches, f"{zero} / {most}", f"{one} / {most}")
    lines = [_row(*headers), _rule(len(headers) - 1)]
    for name, run in runs.items():
        found = run["streaming"]["perplexity"]
        above = dict(map(tuple, above_vanilla(name, runs))).get(run["validation_loss"][-1][0])
        relative = "" if above is None else _minus(f"{above:+.2f} %")
        cells = (_number(found[cache]) if cache in found else "" for cache in caches)
        ratios = (f"{found[zero] / found[most]:.3f}", f"{found[one] / found[most]:.4f}") if most in found else ("", "")
        lines.append(_row(label(name, run), last_loss(run), relative, *cells, *ratios))
    return "\n".join(lines)


def cache_sizes(runs: Runs) -> str:
    """The paper's Table 6: perplexity by the size of the cache, with each number of kept tokens."""
    rows = []
    for name, run in runs.items():
        found: dict[int, dict[int, float]] = {}  # by kept tokens, then by size
        for cache, value in run.get("cache_sizes", {"perplexity": {}})["perplexity"].items():
            num_kept, window = map(int, cache.split("+"))
            found.setdefault(num_kept, {})[num_kept + window] = value
        rows += [(label(name, run), num_kept, by_size) for num_kept, by_size in sorted(found.items())]
    sizes = sorted({size for _, _, by_size in rows for size in by_size})
    lines = [_row("", "kept tokens", *(f"{size:,}" for size in sizes)), _rule(len(sizes) + 1)]
    for name, num_kept, by_size in rows:
        lines.append(_row(name, str(num_kept), *(_number(by_size[size]) if size in by_size else "" for size in sizes)))
    return "\n".join(lines) if rows else ""


def sinks(runs: Runs) -> str:
    """Sink rate and attention at the end of training, in percent."""
    places = ("sink token", "first text token", "no token")
    headers = [header for place in places for header in (f"{place}: rate", "attention")]
    lines = [_row("", *headers), _rule(len(headers))]
    for name, run in runs.items():
        if "sinks" in run:
            lines.append(_row(label(name, run), *(cell for place in places for cell in _shares(run["sinks"], place))))
    return "\n".join(lines) if len(lines) > 2 else ""


def _shares(report: dict[str, Any], what: str) -> tuple[str, str]:
    """Sink rate and attention; empty if a model has no such position, or never attends to it."""
    mass = sum(at_place(report["mass"], what))
    return (f"{100 * sink_rate(report, what):.1f}", f"{100 * mass:.1f}") if mass > FAINTEST else ("", "")


def activations(runs: Runs) -> str:
    """States of the named token with the most attention, compared with other positions."""
    headers = ("token", "hidden state: norm", "largest entry", "value: norm", "key: cosine", "other keys: cosine")
    lines = [_row("", *headers), _rule(len(headers))]
    for name, run in runs.items():
        if "sinks" not in run:
            continue
        layers, mass = run["sinks"]["layers"], run["sinks"]["mass"]
        token = max((place for place, k in run["sinks"]["positions"].items() if k >= 0), key=mass.__getitem__)
        hidden, values = (_ratios(layers[q][token], layers[q]["others"]) for q in ("hidden_norm", "value_norm"))
        entries = _ratios(layers["largest_activation"][token], layers["median_activation"])
        cosines = (_minus(f"{fmean(layers['query_key_cosine'][place]):.2f}") for place in (token, "others"))
        extremes = _at(max, hidden, 1), _at(max, entries, 0), _at(min, values, 2)
        lines.append(_row(label(name, run), token, *extremes, *cosines))
    return "\n".join(lines) if len(lines) > 2 else ""


def _ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def _at(extreme: Callable, by_layer: list[float], digits: int) -> str:
    """Format the largest or smallest value, with its layer in brackets."""
    value = extreme(by_layer)
    return f"{value:.{digits}f} ({by_layer.index(value)})"


def zero_shot(runs: Runs) -> str:
    """Table 4: accuracy and standard error, in percent."""
    lines = [_row("", *TASKS), _rule(len(TASKS))]
    for name, run in runs.items():
        if "zero_shot" in run:
            scores = [run["zero_shot"]["tasks"][task] for task in TASKS]
            lines.append(
                _row(label(name, run), *(f"{100 * s['acc']:.1f} ± {100 * s['acc_stderr']:.1f}" for s in scores))
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def tried(runs: Runs) -> str:
    """Every run with its settings, and its sinks at four points of training."""
    headers = ("M tokens", "positions", "learning rate", "weight decay", "validation loss")
    headers += ("sink position", "sink rate, %", "0+ / 4+", "1+ / 4+")
    lines = [_row("", *headers), _rule(len(headers))]
    for name, run in runs.items():
        if "sinks" not in run:
            continue
        checkpoints = run["sinks"]["checkpoints"]
        sink = max(checkpoints[-1]["sink_rate"], key=checkpoints[-1]["sink_rate"].__getitem__)
        rates = [(c["tokens"], f"{100 * c['sink_rate'][sink]:.0f}") for c in checkpoints]
        zero, one = ([(tokens, f"{cost:.3f}") for tokens, cost in cost_over_training(run, i)] for i in (0, 1))
        curves = [_at_quarters(curve, run["tokens"]) for curve in (rates, zero, one)]
        train, optimizer = run["config"]["train"], run["config"]["optimizer"]
        settings = round(run["tokens"] / 1e6), train["seq_length"], optimizer["lr"], optimizer["weight_decay"]
        lines.append(_row(label(name, run), *(f"{value:g}" for value in settings), last_loss(run), sink, *curves))
    return "\n".join(lines) if len(lines) > 2 else ""


def _at_quarters(curve: list[tuple[int, str]], tokens: int) -> str:
    """Return a curve's values near the ends of the quarters of training; a dash if none."""
    shown = []
    for end in (tokens * quarter / 4 for quarter in (1, 2, 3, 4) if curve):
        distance, value = min(((abs(at - end), value) for at, value in curve), key=itemgetter(0))
        shown.append(value if distance <= NEAR * tokens else "–")
    return " → ".join(shown)


def label(name: str, run: dict[str, Any]) -> str:
    """Return a run's name, and the share of training that is done if the run ended early."""
    planned = run["config"]["train"]["num_steps"] * run["config"]["train"]["batch_size_tokens"]
    return name if run["tokens"] >= planned else f"{name} ({100 * run['tokens'] // planned} % of training)"


def last_loss(run: dict[str, Any]) -> str:
    """Return the last validation loss, and its position if it is not the last step."""
    tokens, loss = run["validation_loss"][-1]
    return f"{loss:.4f}" if tokens == run["tokens"] else f"{loss:.4f} at {tokens / 1e6:.0f} M"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(num_numbers: int) -> str:
    return "|---|" + "---:|" * num_numbers


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
