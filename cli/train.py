"""``sinklm train``: pre-train a model from a recipe."""

from typing import Annotated

import typer


def train(
    recipe: Annotated[
        str, typer.Argument(help="A packaged recipe (pythia-160m, paper/learnable-sink, …) or the path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. data.path=store train.num_steps=100"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings, size, memory and steps, and do nothing.")
    ] = False,
) -> None:
    """Train a model with DeepSpeed, from its newest checkpoint if there is one.

    This is one process. For several: `deepspeed --module sinklm.train RECIPE KEY=VALUE…`, or torchrun or srun.
    """
    from ..train.run import train as run

    run(recipe, overrides or [], only_describe=dry_run)
