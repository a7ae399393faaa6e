"""`sinklm eval sinks`: diagnostics of attention sinks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from .options import (
    Device,
    Dtype,
    DtypeName,
    Model,
    Output,
    Quiet,
    check_texts,
    examples,
    note_windows,
    placement,
    print_results,
    progress_bars,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..eval.sinks import Sequences, Statistics


@examples(
    "sinklm eval sinks runs/quickstart --text book.txt",
    "sinklm eval sinks runs/quickstart --store store --num-sequences 10 --checkpoints",
)
def sinks(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file; repeat the option to join several files.", show_default=False),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Token store to read instead of --text; its held-out split is used.", show_default=False),
    ] = None,
    num_sequences: Annotated[int, typer.Option(min=1, help="Number of sequences, spread evenly over the text.")] = 100,
    seq_length: Annotated[int, typer.Option(min=2, help="Positions per sequence, including sinks.")] = 64,
    epsilon: Annotated[
        float,
        typer.Option(min=0, max=1, help="A position is a sink of a head if its mean attention is above this value."),
    ] = 0.3,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Measure every checkpoint of a training run, to see when sinks form."),
    ] = False,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Measure attention sinks: sink rates, attention maps, norms and massive activations."""
    if bool(text) == bool(store):
        raise ValueError("pass exactly one of --text and --store")
    check_texts(text or [])
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval.loading import load_causal_model
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..eval.sinks import sequences_of_store, sequences_of_texts
    from ..eval.sinks.plots import plot_sinks
    from ..eval.sinks.tables import as_json, heads_table, massive_table, named_positions, positions_table, summary
    from ..models.config import num_prepended_sinks, sink_config

    run = _checkpoints_of(model) if checkpoints else {}
    place = placement(device, dtype)
    loaded, tokenizer = load_causal_model(model, **place), load_tokenizer(model)
    num_sinks = num_prepended_sinks(loaded.config)
    wanted = (tokenizer, num_sequences, seq_length - num_sinks)
    sequences = sequences_of_store(store, *wanted) if store else sequences_of_texts(text or [], *wanted)
    exported = sink_config(loaded.config).num_sinks - num_sinks  # which the tokenizer of an export adds
    positions = named_positions(num_sinks + exported, sequences.num_prefix - exported)
    folder = output or default_output(model)
    file = ReportFile(folder / "sinks.json")
    facts = {"text": sequences.source, "num_sequences": num_sequences, "seq_length": seq_length, "epsilon": epsilon}
    report = new_report(loaded, model, **facts)
    note_windows(console, loaded, model, has_cache=False)

    if run:
        report["checkpoints"] = []
        for state, statistics in _measure_run(console, run, sequences, epsilon, place):
            report["checkpoints"].append(state | summary(statistics, positions))
            file.keep(report)
    else:
        statistics = _measure(console, loaded, sequences, epsilon, name="sequences")
    report |= as_json(statistics, positions)
    file.finish(report)
    pictures = plot_sinks(report, folder, title=display_name(model))
    console.print(positions_table(report, f"Attention sinks: {display_name(model)}"))
    console.print(heads_table(report))
    console.print(massive_table(report) if report["massive_activations"] else "No massive activations.")
    print_results(console, [file.path, *pictures])


def _checkpoints_of(run: str) -> dict[int, Path]:
    """Return the complete checkpoints of a training run by step."""
    from ..checkpoints.folders import list_checkpoints

    found = list_checkpoints(Path(run))
    if not found:
        raise ValueError(f"{run} has no complete checkpoint: --checkpoints requires the folder of a training run")
    return found


def _measure_run(
    console: Console, run: dict[int, Path], sequences: "Sequences", epsilon: float, place: dict[str, Any]
) -> Iterator[tuple[dict[str, int], "Statistics"]]:
    """Measure all checkpoints; yield step and training tokens (including sinks), and the result."""
    from ..checkpoints import load_model
    from ..checkpoints.folders import read_state

    for step, checkpoint in run.items():
        tokens = read_state(checkpoint).positions
        statistics = _measure(console, load_model(checkpoint, **place), sequences, epsilon, name=f"step {step}")
        yield {"step": step, "tokens": tokens}, statistics


def _measure(
    console: Console, model: "PreTrainedModel", sequences: "Sequences", epsilon: float, name: str
) -> "Statistics":
    from ..eval.sinks import measure

    with progress_bars(console) as bars:
        bar = bars.add_task(name, total=len(sequences.ids))
        return measure(model, sequences.ids, epsilon=epsilon, progress=lambda num: bars.advance(bar, num))
