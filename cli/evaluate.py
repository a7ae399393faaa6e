"""`sinklm eval zero-shot`, `sinklm eval streaming` and `sinklm eval stream-eval`."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from .options import (
    Caches,
    DataDir,
    Device,
    Dtype,
    DtypeName,
    Memory,
    MemorySize,
    Model,
    Output,
    Quiet,
    Seed,
    Texts,
    Tokens,
    check_folder,
    check_memory,
    check_texts,
    examples,
    memory_options,
    note_windows,
    parse_caches,
    parse_memory,
    parse_names,
    parse_numbers,
    placement,
    print_results,
    progress_bars,
    refuse_unused,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..eval.perplexity import Configuration, Result, TokenizedText
    from ..eval.stream_eval import Answer
    from ..streaming import MemoryOptions

METHODS = ("dense", "window", "streaming", "recompute")  # as in `eval.perplexity`, which imports torch
METHODS_OF_CACHES = ("window", "streaming")  # without --methods, those that --caches needs
MOST_LINES = 100_000_000


@examples(
    "sinklm eval zero-shot runs/quickstart --data-dir benchmarks --limit 20 --log-samples",
    "sinklm eval zero-shot runs/quickstart --tasks rooms --include-path tasks -o results/rooms",
    "sinklm eval zero-shot runs/quickstart --tasks lambada_openai,piqa --limit 100",
)
def zero_shot(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, separated by commas; sinklm_paper is the seven tasks of the paper.")
    ] = "sinklm_paper",
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first N examples of each task.")] = None,
    data_dir: DataDir = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with additional lm-eval task files.")] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Number of few-shot examples in the prompt.", show_default="that of the task"),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Number of requests per batch. auto: the largest that fits a GPU, 8 on a CPU.")
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Maximum number of positions in a request, including sinks.", show_default="the trained length"
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Format prompts with the tokenizer's chat template.")
    ] = False,
    log_samples: Annotated[
        bool,
        typer.Option("--log-samples", help="Write each example with its outputs to samples_TASK.jsonl."),
    ] = False,
    model_args: Annotated[
        str | None,
        typer.Option(
            help="Options of lm-eval's model, e.g. softmax_dtype=float32,logits_cache=False.", metavar="KEY=VALUE,…"
        ),
    ] = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Evaluate a model on zero-shot benchmarks with lm-eval.

    On several GPUs: torchrun --nproc-per-node 2 -m sinklm eval zero-shot MODEL
    """
    if batch_size != "auto" and (not batch_size.isdecimal() or int(batch_size) < 1):
        raise ValueError(f"--batch-size is {batch_size!r}: it must be a positive number or auto")
    check_folder(data_dir, "--data-dir")
    check_folder(include_path, "--include-path")
    console = Console(is_quiet=quiet or int(os.environ.get("RANK", "0")) > 0)  # of torchrun or accelerate
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval.lm import own_device, parse_options
    from ..eval.loading import load_causal_model
    from ..eval.quiet import quiet_libraries
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..eval.zero_shot import evaluate, find_tasks, results_table, write_results

    options = parse_options(model_args)
    names = [name.strip() for name in tasks.split(",")]
    with quiet_libraries(shows_progress=not console.is_quiet):
        found = find_tasks(names, include_path=include_path, data_dir=data_dir, num_fewshot=num_fewshot)
    placed = placement(own_device(device), dtype)
    loaded, tokenizer = load_causal_model(model, **placed), load_tokenizer(model)
    note_windows(console, loaded, model, has_cache=False)
    file = ReportFile((output or default_output(model)) / "zero_shot.json")
    with quiet_libraries(shows_progress=not console.is_quiet):
        results = evaluate(
            loaded,
            tokenizer,
            found,
            limit=limit,
            batch_size=batch_size if batch_size == "auto" else int(batch_size),
            max_length=max_length,
            apply_chat_template=apply_chat_template,
            log_samples=log_samples,
            model_args=options,
        )
    if results is None:  # another process than the first
        return
    samples = results.pop("samples", {})
    paths = write_results(file, new_report(loaded, model, **results), samples)
    console.print(
        results_table(results, f"Zero-shot: {display_name(model)}" + (f", first {limit} examples" if limit else ""))
    )
    print_results(console, [file.path, *paths])


@examples(
    "sinklm eval streaming runs/quickstart --text book.txt --tokens 2000",
    "sinklm eval streaming runs/quickstart --text book.txt --caches 0+64,1+63 -o results/book",
)
def streaming(
    model: Model,
    text: Texts,
    tokens: Tokens = None,
    caches: Caches = None,
    memory: Memory = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas: dense, window (caches with 0 kept tokens), streaming (caches with kept "
            "tokens), recompute (no cache, one pass over a window per token).",
            show_default="dense, and window or streaming as in --caches",
        ),
    ] = None,
    recompute_every: Annotated[
        int, typer.Option(min=1, help="With recompute, score only every N-th token, because it is slow.")
    ] = 1,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on a long text with dense, window and streaming attention (--methods).

    With --memory, each cache is measured without and with the memory.
    """
    given, size = None if caches is None else parse_caches(caches), parse_memory(memory)
    check_memory(size, given or [])
    wanted = None if methods is None else parse_names(methods, "--methods", METHODS)
    _check_methods(wanted or METHODS_OF_CACHES, given or [], size, recompute_every)
    check_texts(text)
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval import perplexity
    from ..eval.loading import load_causal_model
    from ..eval.plots import plot_streaming
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..models.config import num_prepended_sinks

    tokenized = perplexity.read_text_files(text, load_tokenizer(model), tokens)
    loaded = load_causal_model(model, **placement(device, dtype))
    shapes = given or perplexity.default_caches(loaded)
    chosen = perplexity.configurations(
        perplexity.default_methods(shapes) if wanted is None else wanted,
        shapes,
        num_sinks=num_prepended_sinks(loaded.config),
        memory=memory_options(size),
    )
    perplexity.refuse_unmeasurable(loaded, tokenized, chosen)
    folder = output or default_output(model)
    file = ReportFile(folder / "streaming.json")
    report = new_report(loaded, model, recompute_every=recompute_every)
    note_windows(console, loaded, model)
    results = []
    for result in _measure_all(console, loaded, tokenized, chosen, recompute_every):
        results.append(result)
        report |= perplexity.as_json(results, tokenized)
        file.keep(report)
    file.finish(report)
    plot_streaming(report, folder / "streaming.png", title=display_name(model))
    console.print(
        perplexity.results_table(
            results,
            tokenized,
            f"Perplexity on {report['text']['num_tokens']:,} tokens: {display_name(model)}",
            report["model"]["windows"],
        )
    )
    _explain_unscored(console, results, tokenized, recompute_every, report["model"]["max_position_embeddings"])
    print_results(console, [file.path, folder / "streaming.png"])


@examples(
    "sinklm eval stream-eval runs/quickstart --num-samples 1 --num-lines 210 --caches 0+128,1+127",
    "sinklm eval stream-eval runs/quickstart --caches 0+64,1+63 --distances 10,20 --num-samples 2 --num-lines 50",
)
def stream_eval(
    model: Model,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of streams to read.")] = 100,
    num_lines: Annotated[int, typer.Option(min=2, help="Number of lines per stream.")] = 1000,
    lines_per_question: Annotated[int, typer.Option(min=1, help="Lines from one question to the next.")] = 10,
    caches: Caches = None,
    memory: Memory = None,
    distances: Annotated[
        str, typer.Option(help="Distances from a question to its line, in lines, separated by commas.")
    ] = "20,40,60,80,100,150,200",
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Rows of a forward pass. With fewer streams than rows, several questions share a pass."
        ),
    ] = 8,
    seed: Seed = 0,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Run StreamEval: how well a model recalls a line that it read some lines ago.

    With --memory, each cache is measured without and with the memory, in batches of one stream.
    """
    chosen_distances = parse_numbers(distances, "--distances")
    given, size = None if caches is None else parse_caches(caches), parse_memory(memory)
    check_memory(size, given or [])
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    from ..checkpoints import load_tokenizer
    from ..eval.loading import load_causal_model
    from ..eval.perplexity import default_caches, refuse_small_caches, without_and_with
    from ..eval.plots import plot_stream_eval
    from ..eval.report import ReportFile, default_output, display_name, new_report
    from ..eval.stream_eval import ask, check_distances, results_table, tokens_per_line
    from ..eval.tasks.stream_eval.records import make_records
    from ..models.config import num_prepended_sinks

    check_distances(chosen_distances, num_lines, lines_per_question)
    if num_samples * num_lines > MOST_LINES:
        raise ValueError(
            f"--num-samples {num_samples} × --num-lines {num_lines} are more than {MOST_LINES:,} lines: lower one of "
            "them"
        )
    loaded, tokenizer = load_causal_model(model, **placement(device, dtype)), load_tokenizer(model)
    shapes = given or default_caches(loaded)
    refuse_small_caches(shapes, num_prepended_sinks(loaded.config))
    records = make_records(num_samples, num_lines, seed)
    folder = output or default_output(model)
    file = ReportFile(folder / "stream_eval.json")
    counts = {"num_samples": num_samples, "num_lines": num_lines, "lines_per_question": lines_per_question}
    report = new_report(loaded, model, **counts, seed=seed, results=[])
    note_windows(console, loaded, model)
    report["tokens_per_line"] = tokens_per_line(tokenizer, records[0])
    runs = without_and_with(memory_options(size), shapes)
    options = {"distances": chosen_distances, "lines_per_question": lines_per_question, "batch_size": batch_size}
    asked = partial(ask, loaded, tokenizer, records, **options)  # type: ignore[arg-type]  # values of several types
    num_read = num_samples * ((num_lines - 1) // lines_per_question * lines_per_question)
    for result in _ask_all(console, asked, runs, num_read):
        report["results"].append(result)
        file.keep(report)
    file.finish(report)
    plot_stream_eval(report, folder / "stream_eval.png", title=display_name(model))
    console.print(
        results_table(report["results"], f"StreamEval, accuracy in percent by distance in lines: {display_name(model)}")
    )
    console.print(f"One line is {report['tokens_per_line']:.1f} tokens.")
    print_results(console, [file.path, folder / "stream_eval.png"])


def _ask_all(
    console: Console,
    asked: Callable[..., Iterator["Answer"]],
    runs: list[tuple[tuple[int, int], "MemoryOptions | None"]],
    num_lines: int,
) -> Iterator[dict[str, Any]]:
    """Run StreamEval with one cache after the other.

    Args:
        asked: returns the answers with a cache.
        num_lines: of all streams.
    """
    from ..eval.perplexity import cache_name
    from ..eval.stream_eval import summarize

    with progress_bars(console) as bars:
        for (num_kept, window), memory in runs:
            bar = bars.add_task(cache_name(num_kept, window, memory), total=num_lines)
            started = time.perf_counter()
            answers = asked(
                num_kept=num_kept,
                window=window,
                memory=memory,
                progress=lambda num_lines, bar=bar: bars.advance(bar, num_lines),
            )
            yield summarize(list(answers), num_kept, window, time.perf_counter() - started, memory)


def _check_methods(
    methods: Sequence[str], caches: list[tuple[int, int]], memory: MemorySize | None, recompute_every: int
) -> None:
    """Raise a ValueError for an option, or a cache of ``--caches``, that no method uses."""
    used = set(methods)
    refuse_unused(
        {"--recompute-every": recompute_every > 1 and "recompute" not in used},
        "without recompute in --methods: add this method, or leave the option out",
    )
    refuse_unused(
        {"--memory": memory is not None and used.isdisjoint(METHODS_OF_CACHES)},
        "without window or streaming in --methods: add one of them, or leave the option out",
    )
    for num_kept, window in caches:
        method = "streaming" if num_kept else "window"
        refuse_unused(
            {f"--caches {num_kept}+{window}": used.isdisjoint({method, "recompute"})},
            f"without {method} or recompute in --methods: add one of them, or remove this cache",
        )


def _measure_all(
    console: Console,
    model: "PreTrainedModel",
    tokenized: "TokenizedText",
    chosen: list["Configuration"],
    recompute_every: int,
) -> Iterator["Result"]:
    """Run one configuration after the other, each with its own progress bar."""
    from ..eval.perplexity import measure

    with progress_bars(console) as bars:
        for configuration in chosen:
            bar = bars.add_task(str(configuration), total=len(tokenized.ids) - 1)
            yield measure(
                model,
                tokenized,
                configuration,
                recompute_every=recompute_every,
                progress=lambda num_tokens, bar=bar: bars.advance(bar, num_tokens),  # type: ignore[misc]
            )


def _explain_unscored(
    console: Console,
    results: list["Result"],
    tokenized: "TokenizedText",
    recompute_every: int,
    trained_length: int | None,
) -> None:
    """Print why some results include fewer tokens than the text has."""
    from ..eval.losses import DENSE_LENGTHS

    num_tokens = len(tokenized.ids) - tokenized.num_prefix
    for result in results:
        missing = num_tokens - result.num_scored
        if missing > 1 and result.configuration.method == "dense":
            is_long = trained_length and result.num_scored >= DENSE_LENGTHS * trained_length - 1
            reason = f"{DENSE_LENGTHS} × the trained length" if is_long else "because its cache fills the free memory"
            console.print(f"dense: stopped after {result.num_scored:,} tokens, {reason}")
        elif missing > 1 and result.configuration.method == "recompute":
            console.print(
                f"{result.configuration}: after the first window, one in {recompute_every} tokens is scored"
                " (--recompute-every)"
            )
    if any(num_tokens - result.num_scored == 1 for result in results):
        console.print("The first token is not scored: it has no context.")
