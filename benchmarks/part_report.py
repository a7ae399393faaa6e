"""Report of a benchmark in parts: tables on the terminal, and a JSON file that calls share."""

import json
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

SPREAD = "± "  # begins the name of a spread, which is followed by that of its mean


class PartReport:
    """Prints and stores the results of parts.

    Results that the file has of other parts and sizes are kept, so that parts can be measured by
    several calls.

    Args:
        settings: stored beside each result, which may be of another call.
        minutes: no part begins later.

    Raises:
        SystemExit: the file has results of another device or version of torch.
    """

    def __init__(self, path: Path, settings: dict[str, Any], minutes: float):
        self._path, self._settings, self._minutes = path, settings, minutes
        self._started = time.perf_counter()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        here = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
        self.content: dict[str, Any] = {**here, "settings": {}, "parts": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            theirs = {key: self.content.get(key) for key in here}
            if other := [key for key in here if theirs[key] != here[key]]:
                raise SystemExit(
                    f"{path} has results of {other[0]} {theirs[other[0]]}, not {here[other[0]]}: pass another --output"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        print(device, torch.__version__, flush=True)

    def rows(self, part: str) -> list[dict]:
        """Return the results of the sizes of a part that have the settings of this call."""
        found, settings = self.content["parts"].get(part, []), self.content["settings"]
        return [row for row in found if settings.get(f"{part} {row['size']}") == self._settings]

    def add(self, part: str, measure: Callable[[], list[dict]], size: str = "") -> None:
        """Measure a part, or a size of it, in place of older results of the same."""
        elapsed = time.perf_counter() - self._started
        if elapsed > 60 * self._minutes:
            print(f"\n{part} {size}: skipped after {elapsed:.0f} s", flush=True)
            return
        try:
            rows = measure()
        except Exception as error:
            traceback.print_exc()
            rows = [{"size": size, "error": f"{type(error).__name__}: {error}"[:300]}]
        others = [row for row in self.content["parts"].get(part, []) if size and row.get("size") != size]
        self.content["parts"][part] = others + rows
        self.content["settings"][f"{part} {size}".strip()] = self._settings
        self._path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        print(f"\n{part} {size} ({time.perf_counter() - self._started:.0f} s)\n\n{table(rows)}", flush=True)


def with_spread(
    name: str, values: Sequence[float], middle: Callable[[Sequence[float]], float] = fmean
) -> dict[str, float | None]:
    """Return the mean of values as ``name``, and their standard deviation as ``± name``.

    Args:
        middle: `statistics.median` in place of the mean.
    """
    return {name: middle(values), f"{SPREAD}{name}": spread(values)}


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of values; None of a single one."""
    return stdev(values) if len(values) > 1 else None


def shown(row: dict[str, Any], name: str) -> str:
    """Return the cell of a value, with its spread if there is one."""
    return f" {SPREAD}".join(filter(None, (cell(row.get(name)), cell(row.get(SPREAD + name)))))


def table(rows: list[dict]) -> str:
    """Return a Markdown table with spreads beside means; columns with dictionaries are left out."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict))
    columns = [name for name in names if not name.startswith(SPREAD)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(shown(row, name) for name in columns) + " |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return "" if value is None else " ".join(str(value).replace("|", r"\|").splitlines())
