"""`sinklm eval compare`: one table and one picture from the results of several models."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .options import Quiet, examples, print_results


@examples(
    "sinklm eval compare runs/quickstart results/rooms",
    "sinklm eval compare results/rooms/zero_shot.json results/book/streaming.json -o results/compare-files",
)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Two or more models that were evaluated, folders given as --output, or JSON files of results. "
            "Differences are relative to the first.",
            show_default=False,
            metavar="RUN…",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table and the picture.")] = Path(
        "results/compare"
    ),
    quiet: Quiet = False,
) -> None:
    """Compare several models: zero-shot, perplexity, streaming, StreamEval, questions, sinks.

    Writes compare.md, compare.csv, compare.json and compare.png.
    """
    from ..eval.compare import compare as compare_runs
    from ..eval.compare_output import csv_text, legend, markdown, plot_comparison, results_table
    from ..files import check_writable, write_json, write_text

    console = Console(is_quiet=quiet)
    comparison = compare_runs(runs)
    check_writable(output / "compare.json")
    write_json(output / "compare.json", comparison.as_json(), allow_nan=False)
    write_text(output / "compare.csv", csv_text(comparison))
    write_text(output / "compare.md", markdown(comparison))
    paths = [output / f"compare.{suffix}" for suffix in ("md", "csv", "json")]
    if plot_comparison(comparison, output / "compare.png"):
        paths.append(output / "compare.png")
    console.print(results_table(comparison, "Comparison", console.width))
    if signs := legend(comparison):
        console.print(signs)
    for note in comparison.notes:
        console.warn(note)
    print_results(console, paths)
