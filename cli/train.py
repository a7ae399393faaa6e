"""``sinklm train``: pre-train a model from a recipe; ``sinklm recipes``: the packaged recipes."""

from typing import Annotated

import typer

from ..console import Console
from .options import examples


def _print_keys(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from ..train.keys import keys_text

    console = Console()
    console.write(keys_text(console.width))
    raise typer.Exit


@examples(
    "sinklm recipes",
    "sinklm train paper/learnable-sink --dry-run",
)
def recipes() -> None:
    """List the packaged recipes for `sinklm train`."""
    from rich.table import Table

    from ..train.recipe import describe_recipe, recipe_names

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name in recipe_names():
        table.add_row(name, describe_recipe(name))
    Console(highlight=False).print(table)


@examples(
    "sinklm train quickstart data.path=store train.num_steps=20",
    "sinklm train pythia-160m --dry-run",
    "sinklm train --keys",
)
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Packaged recipe (pythia-160m, paper/learnable-sink, …; `sinklm recipes` lists them), path of a "
            "YAML file, or folder of a run to resume."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that override the recipe, e.g. data.path=store train.num_steps=100"
        ),
    ] = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            callback=_print_keys,
            is_eager=True,
            help="Print all keys with type, default and meaning, and exit.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved settings, model size, memory and steps without training."),
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint",
            help="Resume even if the checkpoint has pickled code, or no checksums, as those of older versions.",
        ),
    ] = False,
) -> None:
    """Train a model with DeepSpeed. Resumes from the newest checkpoint if there is one.

    To resume an interrupted run, run the same command again. This command runs one process.
    For several GPUs, use `deepspeed --module sinklm.train RECIPE KEY=VALUE…`, torchrun or srun.
    """
    Console().note("loading torch …")
    from ..train.run import train as run

    run(recipe, overrides or [], only_describe=dry_run, trust_checkpoint=trust_checkpoint)
