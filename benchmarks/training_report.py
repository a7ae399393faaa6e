"""Write the tables of docs/results/training-speed.md, of train.py and float8.py.

    python benchmarks/training_report.py results     # take the JSON files of this folder
    python benchmarks/training_report.py             # training-speed.json in docs/results again

A factor compares two contestants of one call of train.py, on one GPU, one after the other.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page
from seed_tables import table

NAME = "training-speed"
PEERS = {"transformers": "transformers", "litgpt": "litgpt", "nanogpt": "a nanoGPT-style loop"}
STAGE = "deepspeed.zero_stage="
Row = dict[str, Any]


def main() -> None:
    make_page(NAME, __doc__, tables, collect)


def collect(folder: Path) -> dict[str, Any]:
    """Return the reports of train.py in a folder, and the steps that float8.py measured.

    Raises:
        ValueError: the reports are of different devices or versions of torch.
    """
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found: dict[str, Any] = {"calls": [], "float8": []}
    for report in reports:
        steps = report.get("parts", {}).get("steps", [])
        rows = [row for row in report.get("rows", []) if "error" not in row]
        if not (rows or steps):  # of another benchmark, or all failed
            continue
        here = {key: report.get(key) for key in ("device", "python", "torch")}
        if different := [key for key, value in here.items() if found.setdefault(key, value) != value]:
            raise ValueError(f"{folder} has results of {different[0]} {found[different[0]]} and {here[different[0]]}")
        found["float8"] += [row for row in steps if "error" not in row]
        if rows:
            settings = {key: value for key, value in report["settings"].items() if key != "output"}
            found["calls"].append({"settings": settings, "rows": rows})
    found["float8"].sort(key=lambda row: parameters(row["size"]))
    found["calls"].sort(key=lambda call: (parameters(call["rows"][0]["size"]), call["rows"][-1]["ranks"], stage(call)))
    return found


def parameters(size: str) -> float:
    return float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]


def stage(call: dict[str, Any]) -> int:
    """Return the ZeRO stage of a call of train.py."""
    given = [override.removeprefix(STAGE) for override in call["settings"]["overrides"] if override.startswith(STAGE)]
    return int(given[-1]) if given else 1


def zero_of(call: dict[str, Any]) -> str:
    suffix = ", not compiled" if "train.compile=false" in call["settings"]["overrides"] else ""
    return f"ZeRO-{stage(call)}{suffix}"


def tables(found: dict[str, Any]) -> dict[str, str]:
    return {
        "one_gpu": one_gpu(found["calls"]),
        "muon": muon(found["calls"]),
        "float8": float8(found["float8"]),
        "two_gpus": two_gpus(found["calls"]),
        "runs": runs(found["calls"]),
    }


def one_gpu(calls: list[dict[str, Any]]) -> str:
    """One row for each size: sinklm, and how much faster it is than the others of its call."""
    rows = []
    for call in calls:
        by_name = {row["contestant"]: row for row in call["rows"] if row["ranks"] == 1}
        if by_name.keys() & PEERS.keys():
            if (ours := by_name.get("sinklm")) is None:
                continue
            cells = [size_of(ours), batch_of(ours), *speed_of(ours)]
            rows.append([*cells, *(over(ours, by_name.get(peer)) for peer in PEERS)])
    headers = ["size", "micro-batches", "tokens/s", "MFU", "memory, GiB"]
    return table([*headers, *(f"over {peer}" for peer in PEERS.values())], rows)


def muon(calls: list[dict[str, Any]]) -> str:
    """One row for each call with both optimizers."""
    rows = []
    for call in calls:
        by_name = {row["contestant"]: row for row in call["rows"]}
        if {"sinklm", "sinklm-muon"} <= by_name.keys():
            adamw, with_muon = by_name["sinklm"], by_name["sinklm-muon"]
            cells = [f"{row['tokens_per_second']:,.0f}" for row in (adamw, with_muon)]
            memory = [f"{row['memory_gib']:.1f}" for row in (adamw, with_muon)]
            rows.append([size_of(adamw), batch_of(adamw), *cells, over(with_muon, adamw, 3), *memory])
    headers = ["size", "micro-batches", "tokens/s, AdamW", "Muon", "Muon over AdamW", "memory, GiB, AdamW", "Muon"]
    return table(headers, rows)


def two_gpus(calls: list[dict[str, Any]]) -> str:
    """One row for each size and ZeRO stage on two GPUs; its base is one GPU under ZeRO-1."""
    rows, bases = [], {}
    for call in calls:
        bases |= {row["size"]: row for row in call["rows"] if call["rows"][-1]["ranks"] == 2 and row["ranks"] == 1}
        for row in call["rows"]:
            if row["ranks"] == 2:
                one = bases.get(row["size"])
                linear = percent(row["tokens_per_second"] / one["tokens_per_second"] / 2) if one else ""
                rows.append([size_of(row), zero_of(call), *speed_of(row), linear])
    return table(["size", "stage", "tokens/s", "MFU", "GiB on each GPU", "of twice one GPU"], rows)


def float8(steps: list[Row]) -> str:
    rows = [
        [
            size_of(row),
            row["precision"],
            f"{row['ms']:.1f} ± {row['± ms']:.1f}",
            f"{row['tokens/s']:,.0f}",
            f"{row['GiB']:.1f}",
            f"{row['× bf16']:.3f} × ({row['×, least']:.3f} to {row['×, most']:.3f})" if row["× bf16"] != 1 else "",
        ]
        for row in steps
    ]
    return table(["size", "precision", "ms", "tokens/s", "memory, GiB", "over bf16"], rows)


def runs(calls: list[dict[str, Any]]) -> str:
    rows = []
    for number, call in enumerate(calls, 1):
        for row in call["rows"]:
            zero = f", {zero_of(call)}" if row["contestant"].startswith("sinklm") else ""
            milliseconds = f"{1e3 * row['seconds_per_step']:,.1f} ± {1e3 * row['stdev']:.1f}"
            cells = [size_of(row), f"`{row['contestant']}`", f"{row['ranks']}{zero}", batch_of(row), milliseconds]
            rows.append([*cells, *speed_of(row), f"{row['start']:.0f}", str(number)])
    headers = ["size", "contestant", "GPUs", "micro-batches", "ms per update", "tokens/s", "MFU", "memory, GiB"]
    return table([*headers, "start, s", "call"], rows)


def size_of(row: Row) -> str:
    return str(row["size"]).upper()


def batch_of(row: Row) -> str:
    return f"{row['num_micro_batches']} × {row['micro_batch_size']}"


def speed_of(row: Row) -> list[str]:
    return [f"{row['tokens_per_second']:,.0f}", percent(row["mfu"]), f"{row['memory_gib']:.1f}"]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def over(ours: Row, theirs: Row | None, digits: int = 2) -> str:
    return f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.{digits}f} ×" if theirs else ""


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
