"""The command `sinklm`: argument parsing and calls only."""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from ..extras import MissingExtraError
from .bench import decode
from .chat import chat
from .evaluate import stream_eval, streaming, zero_shot
from .export import export
from .generate import generate
from .prepare import prepare
from .runs import runs
from .sinks import sinks
from .tokenizer import train as train_tokenizer
from .train import train

app = typer.Typer(
    name="sinklm",
    help="Pre-train language models with a learnable sink token, and stream text of any length in constant memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train tokenizers.")
eval_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate a model: zero-shot benchmarks, streaming perplexity and recall, attention sinks.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory of a model.")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(metadata.version("sinklm"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.command()(prepare)
tokenizer_app.command("train")(train_tokenizer)
app.command()(train)
app.command()(runs)
eval_app.command("zero-shot")(zero_shot)
eval_app.command("streaming")(streaming)
eval_app.command("stream-eval")(stream_eval)
eval_app.command("sinks")(sinks)
app.command()(export)
bench_app.command("decode")(decode)
app.command()(generate)
app.command()(chat)


def main() -> None:
    """Run the command. An error of the user is printed to stderr in one line, with exit status 1.

    Set ``SINKLM_DEBUG=1`` to see the traceback.
    """
    try:
        app()
    except Exception as error:
        says_it_itself = isinstance(error, ValueError | OSError | MissingExtraError)
        if os.environ.get("SINKLM_DEBUG") or not (says_it_itself or _is_lack_of_memory(error)):
            raise
        hint = "" if says_it_itself else "out of memory; reduce the cache, batch size or number of processes: "
        sys.exit(f"error: {hint}{error}")


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether torch or numpy ran out of memory; checked without importing them."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
