"""Statistics as JSON and as tables."""

import math
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..saved_reports import ROUNDING
from .statistics import Statistics

BY_LAYER = (
    "hidden_norm",
    "key_norm",
    "value_norm",
    "key_cosine",
    "query_cosine",
    "query_key_cosine",
    "largest_activation",
    "median_activation",
)
NUM_MAP_LAYERS = 5
NUM_NEXT_POSITIONS = 3  # rows of the table after the first text token
NUM_HEADS_SHOWN = 5
NUM_MASSIVE_SHOWN = 5


def named_positions(num_sinks: int, num_prefix: int) -> dict[str, int]:
    """Return the positions that may be sinks, by name; -1 stands for "no token"."""
    names = {f"sink token {i + 1}" if num_sinks > 1 else "sink token": i for i in range(num_sinks)}
    names |= {f"prefix token {i + 1}" if num_prefix > 1 else "prefix token": num_sinks + i for i in range(num_prefix)}
    return names | {"first text token": num_sinks + num_prefix, "no token": -1}


def as_json(statistics: Statistics, positions: dict[str, int]) -> dict[str, Any]:
    """Return all numbers of tables and plots for JSON; see docs/evaluation.md for the keys."""
    mass, rate = statistics.mass, statistics.sink_rate
    return {
        "positions": positions,
        **summary(statistics, positions),
        "by_position": {"sink_rate": _numbers(rate.mean((0, 1))[:-1]), "mass": _numbers(mass.mean((0, 1))[:-1])},
        "heads": {
            name: {"sink_rate": _numbers(rate[..., k]), "mass": _numbers(mass[..., k])} for name, k in positions.items()
        },
        "layers": {name: _numbers(getattr(statistics, name)) for name in BY_LAYER},
        "massive_activations": [asdict(activation) for activation in statistics.massive_activations],
        "maps": _maps(statistics),
    }


def summary(statistics: Statistics, positions: dict[str, int]) -> dict[str, Any]:
    """Return sink rate and attention mass of the named positions, over all layers and heads."""
    return {
        "sink_rate": {name: float(statistics.sink_rate[..., k].mean()) for name, k in positions.items()},
        "mass": {name: float(statistics.mass[..., k].mean()) for name, k in positions.items()},
    }


def shown_positions(report: dict[str, Any]) -> dict[str, int]:
    """Return the named positions; "no token" only if some attention goes to no token."""
    return {name: k for name, k in report["positions"].items() if name != "no token" or report["mass"][name] > ROUNDING}


def _maps(statistics: Statistics) -> list[dict[str, Any]]:
    """Return maps of some layers: mean over heads, and the head that attends most to position 0."""
    maps = []
    num_layers = len(statistics.maps)
    for layer in torch.linspace(0, num_layers - 1, min(NUM_MAP_LAYERS, num_layers)).round().int().tolist():
        head = int(statistics.mass[layer, :, 0].argmax())
        maps.append({"layer": layer, "head": None, "attention": _numbers(statistics.maps[layer].mean(0))})
        maps.append({"layer": layer, "head": head, "attention": _numbers(statistics.maps[layer, head])})
    return maps


def _numbers(values: Tensor) -> Any:
    """Return nested lists of numbers with six digits, and None for NaN."""
    return _rounded(values.tolist())


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if math.isnan(values) else float(f"{values:.6g}")


def positions_table(report: dict[str, Any], title: str) -> Table:
    table = Table(title=title)
    table.add_column("Position", justify="right")
    table.add_column("Token")
    table.add_column("Sink rate (%)", justify="right")
    table.add_column("Attention (%)", justify="right")
    names = {k: name for name, k in shown_positions(report).items()}
    by_position = report["by_position"]
    end = min(report["positions"]["first text token"] + 1 + NUM_NEXT_POSITIONS, len(by_position["mass"]))
    for k in range(end):
        rate, mass = by_position["sink_rate"][k], by_position["mass"][k]
        table.add_row(str(k), names.get(k, "text"), f"{100 * rate:.2f}", f"{100 * mass:.2f}")
    if -1 in names:
        rate, mass = report["sink_rate"]["no token"], report["mass"]["no token"]
        table.add_row("", "no token", f"{100 * rate:.2f}", f"{100 * mass:.2f}")
    return table


def heads_table(report: dict[str, Any]) -> Table:
    """Return a table of the heads with the most attention to one of the named positions."""
    table = Table(title="Strongest heads")
    for header in ("Layer", "Head"):
        table.add_column(header, justify="right")
    table.add_column("Attend to")
    table.add_column("Attention (%)", justify="right")
    found = [
        (mass, layer, head, name)
        for name in shown_positions(report)
        for layer, heads in enumerate(report["heads"][name]["mass"])
        for head, mass in enumerate(heads)
    ]
    for mass, layer, head, name in sorted(found, reverse=True)[:NUM_HEADS_SHOWN]:
        table.add_row(str(layer), str(head), name, f"{100 * mass:.2f}")
    return table


def massive_table(report: dict[str, Any]) -> Table:
    """Return a table of massive activations by position and dimension, over layers."""
    table = Table(title="Massive activations")
    for header in ("Position", "Dimension", "Layers", "Largest", "× median", "Share (%)"):
        table.add_column(header, justify="right")
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for activation in report["massive_activations"]:
        groups.setdefault((activation["position"], activation["dimension"]), []).append(activation)
    by_share = sorted(groups.items(), key=lambda item: -max(a["share"] for a in item[1]))
    for (position, dimension), found in by_share[:NUM_MASSIVE_SHOWN]:
        layers = sorted(activation["layer"] for activation in found)
        largest = max(found, key=lambda activation: abs(activation["value"]))
        table.add_row(
            str(position),
            str(dimension),
            _ranges(layers),
            f"{largest['value']:,.0f}",
            f"{largest['ratio']:,.0f}",
            f"{100 * max(activation['share'] for activation in found):.0f}",
        )
    return table


def _ranges(numbers: list[int]) -> str:
    """Format ascending integers, with ranges: ``3–9, 12``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
