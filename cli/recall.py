"""`sinklm data generate recall`: records with questions, to train recall."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from .options import Quiet, Seed, examples

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..data.recall import RecallRecord


MOST_DOCUMENTS = 10**12
BATCH_DOCUMENTS = 16  # tokenized in parallel; those of long distances need much memory


@examples(
    "sinklm data generate recall -o recall.jsonl.zst --num-documents 1000 --distances 0-40",
    "sinklm data generate recall -o recall.jsonl --num-tokens 100000 --tokenizer tokenizer.json",
)
def recall(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to create: .jsonl or .jsonl.zst.")],
    num_documents: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_DOCUMENTS, help="Number of documents.", show_default="as many as --num-tokens needs"
        ),
    ] = None,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens after which to stop; requires --tokenizer.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Counts the tokens: a tokenizer.json, a folder with one, or a name on the Hub."),
    ] = None,
    distances: Annotated[
        str,
        typer.Option(
            help="Shortest and longest distance of a question to its line, in lines.", metavar="SHORTEST-LONGEST"
        ),
    ] = "0-200",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Generate records of lines, with questions about earlier lines and their answers.

    Keys, values, lengths and phrasings differ from document to document. No phrasing is that of
    `sinklm eval stream-eval`. The file has the form of the Pile, with the set name recall.
    """
    shortest, longest = _parse_distances(distances)
    if (num_documents is None) == (num_tokens is None):
        raise ValueError("pass exactly one of --num-documents and --num-tokens")
    if num_tokens is not None and tokenizer is None:
        raise ValueError("--num-tokens requires --tokenizer, which counts them")
    if num_documents is not None and tokenizer is not None:
        raise ValueError("--tokenizer counts the tokens of --num-tokens: remove it, or replace --num-documents")
    from ..data.recall import records, write_records
    from ..data.tokenizer import load_tokenizer_file

    console = Console(is_quiet=quiet)
    documents = records(seed, shortest, longest)
    if num_documents is not None:
        documents = islice(documents, num_documents)
    else:
        documents = _until(documents, num_tokens or 0, load_tokenizer_file(tokenizer or ""))
    num_written, num_questions = write_records(output, documents)
    console.print(f"{output}: {num_written:,} documents, {num_questions:,} questions", soft_wrap=True)


def _until(documents: "Iterator[RecallRecord]", num_tokens: int, tokenizer: "Tokenizer") -> "Iterator[RecallRecord]":
    """Yield documents until they have ``num_tokens`` tokens, end-of-document tokens included."""
    num_found = 0
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        encodings = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            yield document
            num_found += len(encoding) + 1
            if num_found >= num_tokens:
                return


def _parse_distances(text: str) -> tuple[int, int]:
    from ..data.recall import check_distances

    match = re.fullmatch(r"\s*(\d{1,9})-(\d{1,9})\s*", text, re.ASCII)
    if not match:
        raise ValueError(f"--distances {text[:40]!r}: write the shortest and the longest in lines, such as 0-200")
    check_distances(int(match[1]), int(match[2]))
    return int(match[1]), int(match[2])
