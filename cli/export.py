"""`sinklm export`: write a checkpoint as a plain GPT-NeoX folder."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from .options import examples


@examples(
    "sinklm export runs/quickstart exports/quickstart",
    "sinklm export runs/quickstart/checkpoints/step-20 exports/step-20",
)
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Training run (its newest checkpoint is used) or checkpoint.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to create; replaces an older export.", show_default=False)],
) -> None:
    """Export a checkpoint as a plain GPT-NeoX folder that transformers loads without sinklm."""
    from ..checkpoints.export import export_model

    folder = export_model(checkpoint, output)
    console = Console()
    console.print(f"{folder} is a plain GPTNeoXForCausalLM. Its README.md shows how to load it with transformers.")
