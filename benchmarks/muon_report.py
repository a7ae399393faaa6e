"""Write the tables of docs/results/muon.md from the results of muon_study.py.

    python benchmarks/muon_report.py results/muon   # take its muon.json
    python benchmarks/muon_report.py                # the one in docs/results again

Models are compared with AdamW's of the same sink and seed: at equal tokens, which is at the end,
and at equal time, which is after the tokens that a model has read when AdamW's ends. A line between
two validations gives the loss there.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page
from seed_tables import mean_and_error, table

Model = dict[str, Any]


def main() -> None:
    make_page("muon", __doc__, tables)


def tables(found: dict[str, Any]) -> dict[str, str]:
    models = sorted(found["models"], key=lambda model: (model["seed"], model["sink"], model["optimizer"]))
    return {"differences": differences(models, found["speed"]), "models": all_models(models, found["speed"])}


def differences(models: list[Model], speed: float | None) -> str:
    """One row for each kind of sink: what Muon changes, with the standard error over seeds."""
    rows = []
    for sink in dict.fromkeys(model["sink"] for model in models):
        pairs = [(model, adamw) for model in models if model["sink"] == sink and (adamw := partner(model, models))]
        if pairs := [(muon, adamw) for muon, adamw in pairs if muon is not adamw]:
            at_end = [muon["validation_loss"][-1][1] - adamw["validation_loss"][-1][1] for muon, adamw in pairs]
            in_time = [loss_in_time(*pair, speed) - pair[1]["validation_loss"][-1][1] for pair in pairs]
            cells = [mean_and_error(values, 4, "+") for values in (at_end, in_time)]
            for name in ("sink_rate", "largest_over_median"):
                cells += [
                    mean_and_error([value(model, name) for model in side], 1) for side in zip(*pairs, strict=True)
                ]
            rows.append([sink, str(len(pairs)), *cells])
    headers = ["Muon minus AdamW", "seeds", "loss, equal tokens", "loss, equal time"]
    headers += ["heads with a sink, %, Muon", "AdamW", "largest activation over median, Muon", "AdamW"]
    return table(headers, rows)


def all_models(models: list[Model], speed: float | None) -> str:
    caches = list(dict.fromkeys(cache for model in models for cache in model["perplexity"]))
    rows = []
    for model in models:
        adamw = partner(model, models)
        cells = [model["name"], f"{model['validation_loss'][-1][1]:.4f}"]
        cells.append(f"{loss_in_time(model, adamw, speed):.4f}" if adamw else "")
        cells.append(f"{model['tokens_per_second']:,.0f}")
        cells += [rate_at(model, "sink"), rate_at(model, "first")]
        cells += [str(len(model["massive_activations"])), f"{model['largest_over_median']:,.0f}"]
        rows.append([*cells, *(f"{model['perplexity'][cache]:.2f}" for cache in caches)])
    headers = ["model", "loss, equal tokens", "loss, equal time", "tokens/s", "heads with a sink on the sink token, %"]
    headers += ["on the first text token, %", "massive activations", "largest over median activation"]
    return table([*headers, *(f"perplexity, {cache}" for cache in caches)], rows)


def partner(model: Model, models: list[Model]) -> Model | None:
    """Return AdamW's model of the same sink and seed."""
    key = ("adamw", model["sink"], model["seed"])
    return next((other for other in models if (other["optimizer"], other["sink"], other["seed"]) == key), None)


def loss_in_time(model: Model, adamw: Model, speed: float | None) -> float:
    """Return the validation loss of a model when AdamW's ends.

    Args:
        speed: tokens/s of Muon over AdamW; None: of the median steps of the runs.
    """
    ratio = model["tokens_per_second"] / adamw["tokens_per_second"] if speed is None else speed
    return loss_at(adamw["tokens"] * (1.0 if model is adamw else ratio), model["validation_loss"])


def loss_at(tokens: float, validations: list[list[float]]) -> float:
    """Return the validation loss at a number of tokens, on the line between two validations."""
    points = sorted(validations)
    for (before, loss), (after, next_loss) in pairwise(points):
        if before <= tokens <= after:
            return loss + (next_loss - loss) * (tokens - before) / (after - before)
    return points[-1][1] if tokens > points[-1][0] else points[0][1]


def value(model: Model, name: str) -> float:
    """Return a result of a model; its sink rate, in percent, is the largest of any position."""
    return 100 * max(model["sink_rate"].values()) if name == "sink_rate" else model[name]


def rate_at(model: Model, place: str) -> str:
    """Return the cell of heads with a sink at a position whose name begins like this."""
    found = [rate for name, rate in model["sink_rate"].items() if name.startswith(place)]
    return f"{100 * found[0]:.1f}" if found else ""


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
