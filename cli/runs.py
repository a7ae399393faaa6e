"""`sinklm runs`: the training runs in folders."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..console import Console
from .options import examples

if TYPE_CHECKING:
    from ..checkpoints.runs import RunSummary

STYLES = {"running": "green", "finished": "", "stopped": "yellow", "damaged": "red"}


@examples(
    "sinklm runs",
    "sinklm runs runs/quickstart --json",
)
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Runs, or folders with runs in them; default: runs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """List training runs: state, step, losses, and the command that resumes a stopped run."""
    from ..checkpoints.runs import find_runs, summarize

    paths = [path for folder in folders or [Path("runs")] for path in find_runs(folder)]
    summaries = [summarize(path) for path in dict.fromkeys(paths)]
    if as_json:
        print(json.dumps([asdict(summary) | {"path": str(summary.path)} for summary in summaries], indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(runs_table(summaries) if summaries else "no runs")
    for summary in summaries:
        if summary.note:
            console.print(summary.note if str(summary.path) in summary.note else f"{summary.path}: {summary.note}")
        if summary.command:
            console.print(f"resume: {summary.command}")


def runs_table(summaries: "list[RunSummary]") -> Table:
    """Return a table with one row for each run, with its attention if a run has windows."""
    table = Table()
    table.add_column("run", overflow="fold")
    table.add_column("state")
    has_windows = any(run.attention for run in summaries)
    if has_windows:
        table.add_column("attention")
    for name in ("step", "saved", "loss", "validation", "updated"):
        table.add_column(name, justify="right")
    for run in summaries:
        table.add_row(
            str(run.path),
            Text(run.state, STYLES[run.state]),
            *([run.attention or "full"] if has_windows else []),
            f"{run.step:,}/{run.num_steps:,}" if run.num_steps is not None else f"{run.step:,}",
            "–" if run.saved_step is None else f"{run.saved_step:,}",
            *("–" if loss is None else f"{loss:.4f}" for loss in (run.loss, run.validation_loss)),
            "–" if run.age is None else f"{human_age(run.age)} ago",
        )
    return table


def human_age(seconds: float) -> str:
    """Format a time with one unit: 12 s, 5 min, 3 h, 2 d."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
