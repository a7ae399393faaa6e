"""``sinklm prepare``: tokenize text to a token store, with progress and a summary."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from .options import Quiet, examples

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..data.manifest import Manifest
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


def print_summary(console: Console, manifest: "Manifest", output: Path) -> None:
    """Print a table by Pile set, largest first, the size of each split, and warnings."""
    from rich import box
    from rich.table import Table

    from ..data.manifest import Counts, Split

    sets: dict[str, Counts] = {}
    total = Counts()
    for split in manifest.splits.values():
        total.add(split.total)
        for name, counts in split.sets.items():
            sets.setdefault(name, Counts()).add(counts)
    held_out = manifest.splits.get("validation", Split(total=Counts(), sets={}, shards=[]))

    table = Table(
        title=f"Token store {output}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("set", no_wrap=True)
    for heading in ("documents", "MB", "M tokens", "share", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add_row(name: str, counts: Counts, num_held_out: int) -> None:
        sizes = f"{counts.documents:,}", f"{counts.bytes / 1e6:,.1f}", f"{counts.tokens / 1e6:,.2f}"
        table.add_row(name, *sizes, f"{counts.tokens / total.tokens:.1%}", f"{num_held_out:,}")

    for name, counts in sorted(sets.items(), key=lambda item: -item[1].tokens):
        add_row(name, counts, held_out.sets.get(name, Counts()).documents)
    table.add_section()
    add_row("all", total, held_out.total.documents)
    console.print(table)
    for name, split in manifest.splits.items():
        console.print(f"{name}: {split.total.tokens:,} tokens", highlight=False)
    if num_empty := sum(source.num_empty_files for source in manifest.sources):
        console.print(f"Skipped {num_empty} empty text file{'s' * (num_empty != 1)}.")
    if num_unknown := sum(source.num_unknown for source in manifest.sources):
        console.print(
            f"{num_unknown:,} of {total.tokens:,} tokens ({num_unknown / total.tokens:.3%}) are the unknown token, for "
            "text that the tokenizer cannot represent; to keep it, use another one, such as a byte-level tokenizer.",
            style="yellow",
            soft_wrap=True,
        )
    nothing = [name for name in sorted(sets) if not held_out.sets.get(name, Counts()).documents]
    if manifest.split_sets and manifest.validation_fraction and nothing and held_out.total.documents:
        console.print(
            f"No document was held out of {', '.join(nothing)}, so validation.by_set and sinklm eval perplexity leave "
            f"{'it' if len(nothing) == 1 else 'them'} out; to change that, raise --validation-fraction.",
            style="yellow",
            soft_wrap=True,
        )
    remedy = "Prepare another folder with a {} --validation-fraction, or divide long texts into documents."
    if total.documents == 1:
        remedy = "A single document is not divided: divide the text into several files, or into lines of JSON."
    if manifest.validation_fraction and not held_out.total.documents:
        console.print(
            "No document was held out for validation, which training requires unless validation.every_steps=null. "
            + remedy.format("larger"),
            style="yellow",
        )
    if held_out.total.documents == total.documents:
        console.print(
            f"All documents were held out, so no text is left to train on. {remedy.format('smaller')}", style="yellow"
        )
