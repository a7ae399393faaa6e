"""``sinklm tokenizer``: train tokenizers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .options import Quiet, examples

SMALLEST_VOCABULARY = 258  # the bytes and two special tokens
LARGEST_VOCABULARY = 2**21  # tokenizers allocates memory for all tokens at the start


@examples(
    "sinklm tokenizer train corpus/ --vocab-size 2048 -o tokenizer.json",
    "sinklm tokenizer train 'corpus/*.jsonl' book.txt --vocab-size 4096 -o large.json",
)
def train(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Text: files, folders, patterns or a data set, as in `sinklm prepare`."),
    ],
    vocab_size: Annotated[
        int,
        typer.Option(
            min=SMALLEST_VOCABULARY,
            max=LARGEST_VOCABULARY,
            help="Number of tokens, including special tokens and the 256 bytes.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("tokenizer.json"),
    quiet: Quiet = False,
) -> None:
    """Train a byte-level BPE tokenizer like that of GPT-NeoX."""
    from ..data.inputs import find_inputs, read_documents
    from ..data.manifest import Counts
    from ..data.tokenizer import train_tokenizer
    from ..files import check_writable, write_text
    from .prepare import note_ignored

    console, counts = Console(is_quiet=quiet), Counts()
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: pass the name of a file, such as {output / 'tokenizer.json'}")
    check_writable(output)
    found = find_inputs(inputs)
    note_ignored(console, found)

    def texts() -> Iterator[str]:
        for document in read_documents(found.shards):
            counts.add(Counts(documents=1, bytes=len(document.text.encode())))
            yield document.text

    with console.stderr_console.status(f"Training a tokenizer of {vocab_size:,} tokens"):
        tokenizer = train_tokenizer(texts(), vocab_size)
    write_text(output, tokenizer.to_str(pretty=True))  # `Tokenizer.save` does not raise OSError
    size = tokenizer.get_vocab_size()
    console.print(f"{output}: {size:,} tokens from {counts.documents:,} documents, {counts.bytes / 1e6:,.1f} MB")
    if size < vocab_size:
        few = f"The text yields only {size:,} of the {vocab_size:,} requested tokens; use more text."
        console.print(few, style="yellow")
