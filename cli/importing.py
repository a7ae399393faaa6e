"""`sinklm import`: make a model with a sink from a released GPT-NeoX model."""

import shlex
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from ..console import Console
from .options import DtypeName, Quiet, Seed, examples, refuse_unused

if TYPE_CHECKING:
    from ..checkpoints.importing import Imported

CONFIGS_PACKAGE = "sinklm.configs"
FALLBACK = "continue/pythia-160m"


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
            help="Initial embedding of the sink token. mean: the mean over all tokens. endoftext: that of the "
            "end-of-text token. random: as in a new model.",
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
    """Import a released GPT-NeoX model, such as Pythia, and add a sink: to evaluate or train it."""
    refuse_unused(
        {"--seed": seed != 0 and sink_row != "random"}, "without --sink-row random: add it, or leave out --seed"
    )
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
    console.note(f"to train on: {_training_command(imported)}")


def _training_command(imported: "Imported") -> str:
    """Return a command that trains on from a model, with the packaged recipe of its sizes."""
    from ..checkpoints.warm_start import architecture

    config = imported.config
    sizes = {key: getattr(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    recipe, is_released = recipe_of(sizes)
    settings: dict[str, object] = {}
    if not is_released:
        settings = {f"model.{key}": value for key, value in architecture(config).items()}
        settings["train.seq_length"] = config.max_position_embeddings
    if not is_released or imported.num_new_rows:
        settings["model.vocab_size"] = config.vocab_size
    if config.sink_kind != "token":
        settings["model.sink.kind"] = config.sink_kind
    settings |= {"model.init_from": str(imported.folder), "data.path": "STORE"}
    if not recipe.startswith("continue/"):
        settings["train.num_steps"] = 5000
    return shlex.join(["sinklm", "train", recipe, *(f"{key}={value}" for key, value in settings.items())])


def recipe_of(sizes: dict[str, int]) -> tuple[str, bool]:
    """Return the packaged recipe of some sizes, or else that of Pythia-160M, and if it has them."""
    folder = files(CONFIGS_PACKAGE)
    for entry in folder.iterdir():
        if entry.name.startswith("pythia-"):
            model = yaml.safe_load(entry.read_text(encoding="utf-8"))["model"]
            if sizes.items() <= model.items():
                own = f"continue/{entry.name}"
                return (own if (folder / own).is_file() else entry.name).removesuffix(".yaml"), True
    return FALLBACK, False
