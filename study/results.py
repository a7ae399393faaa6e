"""Collects the metrics and evaluations of the runs of a folder into a dictionary ready for JSON."""

import json
import re
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from sinklm.checkpoints.folders import list_checkpoints

NUM_LOSS_POINTS = 200  # points of a curve of training losses
NUM_SPEED_STEPS = 1000  # last steps, over which speed and memory are taken


def collect(folder: Path) -> dict[str, Any]:
    """Return all data of docs/results/paper.md for each run of ``folder`` with metrics."""
    runs = sorted(path.parent for path in (folder / "runs").glob("*/metrics.jsonl"))
    if not runs:
        raise FileNotFoundError(f"{folder / 'runs'} contains no run with a metrics.jsonl: train with study/train.py")
    return {"runs": {run.name: collect_run(run, folder / "results" / run.name) for run in runs}}


def of_training(run: Path) -> dict[str, Any]:
    """Return settings without paths, losses and speed of a run, and whether it is finished."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    last, tokens_per_step = steps[-NUM_SPEED_STEPS:], steps[-1]["positions"] // steps[-1]["step"]
    config = _config(run)
    for section, place in (("data", "path"), ("train", "run_dir")):
        config.get(section, {}).pop(place, None)
    found: dict[str, Any] = {
        "config": config,
        "environment": _read(run / "environment.json"),
        "tokens": steps[-1]["positions"],
        "is_finished": is_finished(run),
        "tokens_per_second": median(record["tokens_per_second"] for record in last),
        "mfu": median(record.get("mfu", 0.0) for record in last) or None,
        "memory_gib": max(record["memory_gib"] for record in last),
        "loss": _thinned(steps),
        "validation_loss": [
            [record["step"] * tokens_per_step, record["validation_loss"]]
            for record in records
            if "validation_loss" in record
        ],
    }
    for checkpoint in list(list_checkpoints(run).values())[:1]:  # all have the same data
        found["data_fingerprint"] = _read(checkpoint / "state.json")["data_fingerprint"]
    return found


def is_finished(run: Path) -> bool:
    """Whether the last checkpoint of a run is that of its last step."""
    return max(list_checkpoints(run), default=0) >= _config(run)["train"]["num_steps"]


def collect_run(run: Path, results: Path) -> dict[str, Any]:
    """Return one run's settings, curves and results; missing results are omitted."""
    found = of_training(run)
    readers = {
        "streaming": (results / "streaming.json", _streaming),
        "cache_sizes": (results / "cache-sizes" / "streaming.json", _perplexity),
        "sinks": (results / "sinks.json", _sinks),
        "forming": (results / "forming.json", _forming),
        "zero_shot": (results / "zero_shot.json", _zero_shot),
    }
    for name, (path, read) in readers.items():
        if path.exists():
            found[name] = read(read_report(path, run, results))
    return found


def read_report(path: Path, run: Path, folder: Path) -> dict[str, Any]:
    """Return a report of `sinklm eval` on the last checkpoint of a run.

    Args:
        folder: of all reports and logs to delete if it is one of an earlier checkpoint.

    Raises:
        ValueError: it is one of an earlier checkpoint.
    """
    report = _read(path)
    measured = Path(report["model"]["folder"]).parent.name
    last = next(reversed(list_checkpoints(run).values()), None)
    if last is not None and last.name != measured:
        raise ValueError(f"{path} is of {measured}, and {run} has {last.name}: delete {folder} and evaluate again")
    return report


def arm_of(name: str) -> str:
    """Return the arm of a run: ``gate`` for ``gate-seed-2``."""
    return re.sub(r"-seed-\d+$", "", name)


def vanilla_of(name: str) -> str:
    """Return the plain run of the same size and seed, which has the same data in the same order."""
    size_and_seed = re.search(r"(-\d+x\d+)?(-seed-\d+)?$", name)
    return "vanilla" + size_and_seed.group()  # type: ignore[union-attr]  # always matches


def above_vanilla(name: str, runs: dict[str, dict[str, Any]]) -> list[list[float]]:
    """Return ``[tokens, percent]``: excess of a run's validation losses over its plain run's."""
    vanilla = vanilla_of(name)
    if name == vanilla or vanilla not in runs:
        return []
    theirs = dict(map(tuple, runs[vanilla]["validation_loss"]))
    return [[t, 100 * (loss / theirs[t] - 1)] for t, loss in runs[name]["validation_loss"] if t in theirs]


def cost_over_training(run: dict[str, Any], cache: int) -> list[list[float]]:
    """Return ``[tokens, perplexity / that with the most kept tokens]`` of the checkpoints."""
    checkpoints = run["forming"]["checkpoints"] if "forming" in run else []
    found = [(c["tokens"], list(c["perplexity"].values())) for c in checkpoints]
    return [[tokens, perplexities[cache] / perplexities[-1]] for tokens, perplexities in found]


def at_place(values: dict[str, Any], what: str) -> list[Any]:
    """Return the values of the positions named ``what``: one, or one for each sink token."""
    return [value for name, value in values.items() if name.startswith(what)]


def sink_rate(report: dict[str, Any], what: str) -> float:
    """Return the share of heads whose attention to ``what`` (several: in total) is above ε."""
    rates = at_place(report["sink_rate"], what)
    if len(rates) == 1:
        return rates[0]
    masses = [[mass for layer in heads["mass"] for mass in layer] for heads in at_place(report["heads"], what)]
    return fmean(sum(together) > report["epsilon"] for together in zip(*masses, strict=True))


def _thinned(steps: list[dict]) -> list[list[float]]:
    """Return training losses as means over equal intervals: ``[tokens at its end, loss]``."""
    size = -(-len(steps) // NUM_LOSS_POINTS)
    stretches = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [[stretch[-1]["positions"], fmean(record["loss"] for record in stretch)] for stretch in stretches]


def _perplexity(report: dict) -> dict[str, Any]:
    """Return the perplexity of each cache in a report of `sinklm eval streaming`."""
    return {
        "text_sha256": report["text"]["sha256"],
        "num_tokens": report["text"]["num_tokens"],
        "perplexity": {result["configuration"]: result["perplexity"] for result in report["results"]},
    }


def _streaming(report: dict) -> dict[str, Any]:
    return {
        "num_parameters": report["model"]["num_parameters"],
        **_perplexity(report),
        "bin_edges": report["bin_edges"],
        "binned_losses": {result["configuration"]: result["binned_losses"] for result in report["results"]},
    }


def _sinks(report: dict) -> dict[str, Any]:
    keys = ("num_sequences", "seq_length", "epsilon", "positions", "sink_rate", "mass", "heads", "massive_activations")
    return {key: report[key] for key in (*keys, "checkpoints")} | {"layers": _layers(report)}


def _layers(report: dict) -> dict[str, Any]:
    """Return each quantity by layer: at the named positions, and the mean over the others."""
    named = {name: k for name, k in report["positions"].items() if k >= 0}
    by_position = dict(report["layers"])  # layer by position
    found: dict[str, Any] = {"median_activation": by_position.pop("median_activation")}
    for quantity, rows in by_position.items():
        others = [fmean(value for k, value in enumerate(row) if k not in named.values()) for row in rows]
        found[quantity] = {name: [row[k] for row in rows] for name, k in named.items()} | {"others": others}
    return found


def _forming(report: dict) -> dict[str, Any]:
    return {key: report[key] for key in ("num_tokens", "checkpoints")}


def _zero_shot(report: dict) -> dict[str, Any]:
    return {key: report[key] for key in ("tasks", "num_samples")}


def _config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
