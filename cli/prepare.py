"""``sinklm prepare``: tokenize text to a token store, with progress and a summary."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from .options import Quiet, examples
from .store_summary import print_summary

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..data.prepare import PrepareProgress

LINE_SECONDS = 15.0  # between progress lines if the output is not a terminal


@examples(
    "sinklm prepare corpus/ --tokenizer tokenizer.json -o store",
    "sinklm prepare 'corpus/*.jsonl' book.txt --tokenizer tokenizer.json --split-sets -o stores/by-set",
    "sinklm prepare EleutherAI/the_pile_deduplicated -o stores/pile",
)
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="Files (.jsonl.zst, .jsonl.gz, .jsonl, .parquet; a file of text is one document), folders, "
            "quoted patterns ('src/**/*.c'), or a data set on the Hugging Face Hub "
            "(EleutherAI/the_pile_deduplicated, owner/name:config).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the token store.")],
    tokenizer: Annotated[
        str, typer.Option(help="Name on the Hugging Face Hub, or path of a tokenizer.json.")
    ] = "EleutherAI/gpt-neox-20b",
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON lines, or its column in parquet.")] = "text",
    eod_token: Annotated[
        str | None,
        typer.Option(
            help="Token that ends each document.",
            show_default="the first of <|endoftext|>, <|end_of_text|>, </s>, <eos> that the tokenizer has",
        ),
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            help="Fraction of documents held out for validation, less than 1; documents are chosen by a hash of their "
            "text.",
        ),
    ] = 0.01,
    split_sets: Annotated[
        bool, typer.Option("--split-sets", help="Write each set to its own files, for training with data.weights.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Number of tokenizing processes.", show_default="number of CPUs")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Tokenize text to a token store for training.

    If it is interrupted, run the same command again to resume.
    """
    console = Console(is_quiet=quiet)
    console.note("reading the list of inputs …")
    from ..data.inputs import find_inputs
    from ..data.manifest import MANIFEST_NAME
    from ..data.prepare import has_saved_work, prepare_store
    from ..data.tokenizer import drops_text, training_tokenizer

    was_complete, was_begun = (output / MANIFEST_NAME).exists(), has_saved_work(output)
    found = find_inputs(inputs, text_key=text_key)
    note_ignored(console, found)
    if unchecked := found.without_checksum():
        names = ", ".join(unchecked[:3]) + ", …" * (len(unchecked) > 3)
        console.note(f"no checksums, so damage may go unnoticed, in {len(unchecked)} of the inputs: {names}")
    encoder = training_tokenizer(tokenizer)
    for what in encoder.removed:
        console.note(f"the store's tokenizer is without {what}, which training does not use or adds itself")
    if drops_text(encoder.tokenizer):
        console.warn(
            f"{tokenizer} has no unknown token and not all bytes, so characters that are not in its vocabulary are "
            "lost without a trace; to keep all text, use a byte-level tokenizer"
        )
    going_on = f"Resuming the interrupted work in {output}." if was_begun else None
    with ProgressDisplay(console.stderr_console, opening=going_on) as display:
        manifest = prepare_store(
            found.shards,
            output,
            tokenizer=tokenizer,
            eod_token=eod_token,
            validation_fraction=validation_fraction,
            split_sets=split_sets,
            num_processes=processes,
            report=display.show,
        )
    if was_complete:
        console.print(f"{output} is already complete; nothing to do.", soft_wrap=True)
    print_summary(console, manifest, output)


def note_ignored(console: Console, found: "Inputs") -> None:
    """Print how many files of folders and patterns are no inputs, by the reason."""
    if found.num_ignored:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in found.num_ignored.most_common(8))
        console.note(f"ignored files in folders: {kinds}")


class ProgressDisplay:
    """Shows a progress bar on a terminal, or occasional lines elsewhere, such as in a log file.

    Args:
        opening: message to print before the first progress.
    """

    def __init__(self, console: Console, opening: str | None = None):
        from rich import progress

        self.console, self.opening = console, opening
        self.bar = progress.Progress(
            progress.TextColumn("{task.fields[shard]}", markup=False),
            progress.BarColumn(bar_width=20),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal or console.is_quiet,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None, shard="")
        self.first: tuple[float, PrepareProgress] | None = None
        self.printed_at = time.monotonic()

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if kind is KeyboardInterrupt:
            self.console.print("Interrupted. Run the same command again to resume.")

    def show(self, progress: "PrepareProgress") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, progress)
            if self.opening:
                self.console.note(self.opening)
        text = describe(progress, self.first[1], now - self.first[0])
        self.bar.update(
            self.task,
            description=text,
            shard=progress.shard_name,
            completed=progress.source_bytes,
            total=progress.total_source_bytes,
        )
        if not self.console.is_terminal and now > self.printed_at + LINE_SECONDS:
            self.console.note(f"{progress.shard_name}: {text}")
            self.printed_at = now


def describe(progress: "PrepareProgress", first: "PrepareProgress", seconds: float) -> str:
    """Return amounts, and the speeds since ``first``, which was ``seconds`` ago."""
    counts = progress.counts
    parts = [f"{counts.documents:,} documents", f"{counts.bytes / 1e6:,.1f} MB", f"{counts.tokens / 1e6:,.1f} M tokens"]
    if seconds > 0 and progress.source_bytes >= first.source_bytes:
        parts[0] += f" ({(counts.documents - first.counts.documents) / seconds:,.0f}/s)"
        parts[1] += f" ({(counts.bytes - first.counts.bytes) / seconds / 1e6:,.2f} MB/s)"
        if progress.total_source_bytes and (used := progress.source_bytes - first.source_bytes):
            left = (progress.total_source_bytes - progress.source_bytes) * seconds / used
            parts.append(f"{format_seconds(left)} left")
    return " · ".join(parts)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
