"""The summary of a token store: a table of its sets, its splits, and what to change."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import Console

if TYPE_CHECKING:
    from rich.table import Table

    from ..data.manifest import Manifest, Split

ALL_IN_ONE = "A single document is not divided: divide the text into several files, or into lines of JSON."


def print_summary(console: Console, manifest: "Manifest", output: Path) -> None:
    """Print a table by Pile set, largest first, the size of each split, and warnings."""
    from ..data.manifest import Counts, Split

    held_out = manifest.splits.get("validation", Split(total=Counts(), sets={}, shards=[]))
    console.print(_table(manifest, held_out, f"Token store {output}"))
    for name, split in manifest.splits.items():
        console.print(f"{name}: {split.total.tokens:,} tokens", highlight=False)
    if num_empty := sum(source.num_empty_files for source in manifest.sources):
        console.print(f"Skipped {num_empty} empty text file{'s' * (num_empty != 1)}.")
    for text in _advice(manifest, held_out):
        console.print(text, style="yellow", soft_wrap=True)


def _table(manifest: "Manifest", held_out: "Split", title: str) -> "Table":
    from rich import box
    from rich.table import Table

    from ..data.manifest import Counts

    sets: dict[str, Counts] = {}
    total = Counts()
    for split in manifest.splits.values():
        total.add(split.total)
        for name, counts in split.sets.items():
            sets.setdefault(name, Counts()).add(counts)

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("set", no_wrap=True)
    for heading in ("documents", "MB", "M tokens", "share", "held out"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add_row(name: str, counts: Counts, held: Counts) -> None:
        sizes = f"{counts.documents:,}", f"{counts.bytes / 1e6:,.1f}", f"{counts.tokens / 1e6:,.2f}"
        table.add_row(name, *sizes, f"{counts.tokens / total.tokens:.1%}", f"{held.documents:,}")

    for name, counts in sorted(sets.items(), key=lambda item: -item[1].tokens):
        add_row(name, counts, held_out.sets.get(name, Counts()))
    table.add_section()
    add_row("all", total, held_out.total)
    return table


def _advice(manifest: "Manifest", held_out: "Split") -> Iterator[str]:
    """Yield what is wrong with a store, with the remedy."""
    splits = manifest.splits
    num_tokens = sum(split.total.tokens for split in splits.values())
    if num_unknown := sum(source.num_unknown for source in manifest.sources):
        yield (
            f"{num_unknown:,} of {num_tokens:,} tokens ({num_unknown / num_tokens:.3%}) are the unknown token, for "
            "text that the tokenizer cannot represent; to keep it, use another one, such as a byte-level tokenizer."
        )
    num_documents = sum(split.total.documents for split in splits.values())
    num_held_out = held_out.total.documents
    found = {name for name, counts in held_out.sets.items() if counts.documents}
    nothing = sorted({name for split in splits.values() for name in split.sets} - found)
    if manifest.split_sets and manifest.validation_fraction and nothing and num_held_out:
        yield (
            f"No document was held out of {', '.join(nothing)}, so validation.by_set and sinklm eval perplexity leave "
            f"{'it' if len(nothing) == 1 else 'them'} out; to change that, raise --validation-fraction."
        )
    remedy = "Prepare another folder with a {} --validation-fraction, or divide long texts into documents."
    if num_documents == 1:
        remedy = ALL_IN_ONE
    if manifest.validation_fraction and not num_held_out:
        yield (
            "No document was held out for validation, which training requires unless validation.every_steps=null. "
            + remedy.format("larger")
        )
    if num_held_out == num_documents:
        yield f"All documents were held out, so no text is left to train on. {remedy.format('smaller')}"
