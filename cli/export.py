"""`sinklm export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    checkpoint: Annotated[str, typer.Argument(help="A training run or a checkpoint of it.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
) -> None:
    """Turn a checkpoint into a plain GPT-NeoX folder that transformers runs without sinklm."""
    from ..checkpoints.export import export_model

    folder = export_model(checkpoint, output)
    console = Console()
    console.print(f"{folder} is a plain GPTNeoXForCausalLM; load it with transformers, and read its README.md.")
