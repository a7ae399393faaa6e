"""The command `sinklm`: argument parsing and calls only."""

import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from ..command import run
from ..text import printable
from .bench import decode
from .chat import chat
from .compare import compare
from .data import inspect, merge
from .evaluate import stream_eval, streaming, zero_shot
from .export import export
from .generate import generate
from .importing import import_
from .mistakes import Command, Group, explain
from .options import examples_text
from .perplexity import perplexity
from .prepare import prepare
from .quantization import quantization
from .recall import recall
from .runs import runs
from .sinks import sinks
from .stream_qa import stream_qa
from .tokenizer import train as train_tokenizer
from .train import recipes, train

# click's, or that of the copy of click in newer versions of typer.
UsageError: Any = typer.BadParameter.__base__

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}  # commands of groups inherit them


STEPS = (
    "sinklm tokenizer train corpus/ --vocab-size 2048 -o tokenizer.json",
    "sinklm prepare corpus/ --tokenizer tokenizer.json -o store",
    "sinklm train quickstart data.path=store train.num_steps=20",
    "sinklm eval streaming runs/quickstart --text book.txt --tokens 2000",
    "sinklm export runs/quickstart exports/quickstart",
    "sinklm chat runs/quickstart",
)


def _group(help: str, **options: Any) -> typer.Typer:
    return typer.Typer(
        cls=Group,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="rich",
        context_settings=HELP_OPTIONS,
        **options,
    )


app = _group(
    "Pre-train language models with a learnable sink token, and stream text of any length in constant memory.",
    name="sinklm",
    epilog=examples_text(STEPS, title="From a text to a chat; `sinklm COMMAND -h` has more examples:"),
)
tokenizer_app = _group("Train tokenizers.")
data_app = _group("Join and inspect token stores, and generate text to train on.")
generate_app = _group("Generate text to train on.")
eval_app = _group(
    "Evaluate a model: zero-shot benchmarks, streaming perplexity and recall, attention sinks, quantization."
)
bench_app = _group("Measure speed and memory of a model.")


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
app.add_typer(data_app, name="data")
data_app.add_typer(generate_app, name="generate")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
for _parent, _name, _command in (
    (tokenizer_app, "train", train_tokenizer),
    (app, "prepare", prepare),
    (data_app, "merge", merge),
    (data_app, "inspect", inspect),
    (generate_app, "recall", recall),
    (app, "recipes", recipes),
    (app, "train", train),
    (app, "runs", runs),
    (eval_app, "zero-shot", zero_shot),
    (eval_app, "perplexity", perplexity),
    (eval_app, "streaming", streaming),
    (eval_app, "stream-eval", stream_eval),
    (eval_app, "stream-qa", stream_qa),
    (eval_app, "sinks", sinks),
    (eval_app, "quantization", quantization),
    (eval_app, "compare", compare),
    (app, "import", import_),
    (app, "export", export),
    (bench_app, "decode", decode),
    (app, "generate", generate),
    (app, "chat", chat),
):
    _epilog = examples_text(getattr(_command, "examples", ()))
    _parent.command(_name, cls=Command, epilog=_epilog, context_settings=HELP_OPTIONS)(_command)


def main() -> None:
    """Run the command `sinklm` and end the process."""
    run(_invoke)
    sys.exit(0)


def _invoke() -> None:
    """Parse the arguments and call the function of the command.

    Raises:
        ValueError: wrong arguments.
        SystemExit: with the status of the command.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("sinklm", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            error.show()
        else:
            print(f"error: {printable(explain(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
