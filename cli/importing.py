"""`sinklm import`: make a model with a sink from a released GPT-NeoX model."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .options import DtypeName, Quiet, Seed, examples


@examples(
    "sinklm import EleutherAI/pythia-160m --revision step3000 --sink token",
    "sinklm import EleutherAI/pythia-160m-seed3 --sink-row endoftext -o imported/seed3",
)
def import_(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of a GPT-NeoX model on the Hugging Face Hub, such as EleutherAI/pythia-160m, or its folder.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the Hub; Pythia's are step0 to step143000.", show_default="main"),
    ] = None,
    sink: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="token: one sink token. none: no sink, exactly the model of transformers. zero, logit, kv_bias: an "
            "extra column of the softmax, which changes the output at once.",
        ),
    ] = "token",
    sink_row: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="First embedding of the sink token. mean: of all tokens. endoftext: that of the end-of-text token. "
            "random: as in a new model.",
            show_default="mean",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to create.", show_default="imported/MODEL-REVISION-KIND"),
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Data type of the new weights. auto: as saved.")] = DtypeName.AUTO,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Import a released GPT-NeoX model, such as Pythia, with a sink, to evaluate or train on."""
    console = Console(is_quiet=quiet)
    console.note(f"reading {model}{f' at {revision}' if revision else ''} …")
    from ..checkpoints.importing import import_model

    name = "-".join(filter(None, [Path(model).absolute().name, revision, sink]))
    imported = import_model(
        model,
        output or Path("imported") / name.replace("/", "-"),
        revision=revision,
        sink=sink,
        sink_row=sink_row,
        seed=seed,
        dtype=str(dtype),
    )
    config = imported.config
    sinks = f", sink token {config.sink_token_ids[0]}" if config.num_sinks else f", sink.kind {config.sink_kind}"
    console.print(f"{imported.folder}: {imported.num_parameters:,} parameters{sinks}", soft_wrap=True)
    if imported.num_new_rows:
        console.warn(
            f"the embedding had no unused row: it has {config.vocab_size:,} rows now, {imported.num_new_rows} more; "
            f"set model.vocab_size={config.vocab_size} to train on"
        )
    console.note(f"to train on: sinklm train RECIPE model.init_from={imported.folder} data.path=STORE")
