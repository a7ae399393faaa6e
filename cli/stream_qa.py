"""`sinklm eval stream-qa`: questions one after another in one stream."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from .options import (
    CACHES_HELP,
    CACHES_METAVAR,
    WINDOW_OF_EXPORT,
    DataDir,
    Device,
    Dtype,
    DtypeName,
    Model,
    Output,
    Quiet,
    check_folder,
    examples,
    note_windows,
    parse_caches,
    parse_names,
    placement,
    print_results,
    progress_bars,
    refuse_unused,
)

if TYPE_CHECKING:
    from ..eval.stream_qa import Question

METHODS = ("one-shot", "dense", "stream")
FIRST_IS_TOO_LONG = (
    "dense attention answers no question, because the first is longer than 2 × the trained length or the free memory"
)


@examples(
    "sinklm eval stream-qa runs/quickstart --data-dir benchmarks",
    "sinklm eval stream-qa runs/quickstart --data-dir benchmarks --tasks arc_easy --caches 0+64,4+60 --limit 50",
)
def stream_qa(
    model: Model,
    data_dir: DataDir = None,
    tasks: Annotated[
        str, typer.Option(help="Sets of questions, separated by commas: arc_easy, arc_challenge.")
    ] = "arc_easy,arc_challenge",
    caches: Annotated[
        str | None,
        typer.Option(
            metavar=CACHES_METAVAR,
            help=CACHES_HELP,
            show_default="window attention, and a stream that keeps the sinks or 4 tokens, with a cache of 1024 tokens "
            f"or half the trained length{WINDOW_OF_EXPORT}",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas: one-shot (each question alone), dense, stream (the caches).",
        ),
    ] = "one-shot,dense,stream",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions of each set.")] = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Measure question answering in one endless stream, and with each question alone."""
    shapes = None if caches is None else parse_caches(caches)
    names = parse_names(tasks, "--tasks", ("arc_easy", "arc_challenge"))
    ways = parse_names(methods, "--methods", METHODS)
    refuse_unused(
        {"--caches": shapes is not None and "stream" not in ways},
        "without stream in --methods: add this method, or leave the option out",
    )
    check_folder(data_dir, "--data-dir")
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval import stream_qa as measurement
    from ..eval.loading import load_causal_model
    from ..eval.perplexity import refuse_small_caches
    from ..eval.plots import plot_stream_qa
    from ..eval.quiet import quiet_libraries
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..models.config import num_prepended_sinks

    loaded, tokenizer = load_causal_model(model, **placement(device, dtype)), load_tokenizer(model)
    shapes = shapes or measurement.default_caches(loaded)
    refuse_small_caches(shapes, num_prepended_sinks(loaded.config))
    chosen = [way for name in ways for way in (shapes if name == "stream" else [name])]
    folder = output or default_output(model)
    file = ReportFile(folder / "stream_qa.json")
    report = new_report(loaded, model, limit=limit, questions_sha256={}, results=[])
    note_windows(console, loaded, model)
    num_questions = {}
    for task in names:
        with quiet_libraries(shows_progress=not console.is_quiet):
            questions = _questions(task, data_dir, limit)
        report["questions_sha256"][task] = measurement.fingerprint(questions)
        tokens = measurement.tokenize(tokenizer, questions)
        num_questions[task] = len(tokens)
        for way in chosen:
            with progress_bars(console) as bars:
                name = way if isinstance(way, str) else f"{way[0]}+{way[1]}"
                bar = bars.add_task(f"{task} {name}", total=len(tokens))
                advance = lambda num, bar=bar, bars=bars: bars.advance(bar, num)  # noqa: E731
                result = measurement.measure(loaded, tokenizer, tokens, task, way, advance)
            if result is None:
                console.warn(f"{task}: {FIRST_IS_TOO_LONG}")
                continue
            report["results"].append(result)
            file.keep(report)
    if not report["results"]:
        raise ValueError(f"{FIRST_IS_TOO_LONG}: use --methods stream")
    file.finish(report)
    plot_stream_qa(report, folder / "stream_qa.png", title=display_name(model))
    console.print(measurement.results_table(report["results"], f"Streaming question answering: {display_name(model)}"))
    for row in report["results"]:
        if row["num_questions"] < num_questions[row["task"]]:
            console.print(f"{row['task']}: dense attention stopped after {row['num_questions']} questions.")
    print_results(console, [file.path, folder / "stream_qa.png"])


def _questions(task: str, data_dir: Path | None, limit: int | None) -> "list[Question]":
    from ..eval.local_data import load_rows
    from ..eval.stream_qa import questions_of

    return questions_of(load_rows(task, data_dir)[:limit], f"{task} in {data_dir or 'allenai/ai2_arc'}")
