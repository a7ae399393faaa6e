"""``sinklm train``: pre-train a model from a recipe."""

from typing import Annotated

import typer

from .options import examples


@examples(
    "sinklm train pythia-160m data.path=stores/pile --dry-run",
    "sinklm train quickstart data.path=store train.num_steps=20",
)
def train(
    recipe: Annotated[
        str, typer.Argument(help="Packaged recipe (pythia-160m, paper/learnable-sink, …) or path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings that override the recipe, e.g. data.path=store train.num_steps=100"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved settings, model size, memory and steps without training."),
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint",
            help="Resume also from a checkpoint without checksums (of an older version) or with pickled code.",
        ),
    ] = False,
) -> None:
    """Train a model with DeepSpeed. Resumes from the newest checkpoint if there is one.

    This command runs one process. For several GPUs, use `deepspeed --module sinklm.train RECIPE
    KEY=VALUE…`, torchrun or srun.
    """
    from ..train.run import train as run

    run(recipe, overrides or [], only_describe=dry_run, trust_checkpoint=trust_checkpoint)
