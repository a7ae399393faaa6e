"""`sinklm eval perplexity`: the held-out documents of a token store, by set."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .options import (
    Device,
    Dtype,
    DtypeName,
    Model,
    Output,
    Quiet,
    examples,
    note_windows,
    placement,
    print_results,
    progress_bars,
)


@examples(
    "sinklm eval perplexity runs/quickstart --store store",
    "sinklm eval perplexity runs/quickstart --store store --max-tokens 2000 -o results/sets",
)
def perplexity(
    model: Model,
    store: Annotated[Path, typer.Option(help="Token store; its held-out split is scored.", show_default=False)],
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Score only the first N tokens of each set.", show_default="all")
    ] = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and bits per byte on a store's held-out documents, for each set."""
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval.loading import load_causal_model, open_store_of
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..eval.set_perplexity import SPLIT, measure, results_table, sets_of, total, trained_length

    tokenizer = load_tokenizer(model)
    opened = open_store_of(store, tokenizer)
    sets = sets_of(opened)
    loaded = load_causal_model(model, **placement(device, dtype))
    file = ReportFile((output or default_output(model)) / "perplexity.json")
    facts = {"store": str(store), "store_fingerprint": opened.fingerprint, "split": SPLIT, "max_tokens": max_tokens}
    report = new_report(loaded, model, **facts, length=trained_length(loaded.config))
    note_windows(console, loaded, model, has_cache=False)
    results = []
    with progress_bars(console) as bars:
        for name, tokens in sets.items():
            bar = bars.add_task(name, total=min(len(tokens) - 1, max_tokens or len(tokens)))
            advance = lambda num, bar=bar: bars.advance(bar, num)  # noqa: E731
            results.append(measure(loaded, tokenizer, name, tokens, max_tokens=max_tokens, progress=advance))
            report["results"] = [row.as_json() for row in [*results, total(results)]]
            file.keep(report)
    file.finish(report)
    console.print(results_table(results, f"Perplexity by set: {display_name(model)}"))
    print_results(console, [file.path])
